r"""Questions in plain words over the documentation of this Python's standard library, before and after reranking.

    pip install "bge-rerank-plugins[demo,eval]"
    python examples/plain_questions.py
    python examples/plain_questions.py --model BAAI/bge-reranker-v2-m3 --top-k 50

The embedded models were trained and measured on first sentences of docstrings, which are not what people type. These were
written down by hand, each with the names that answer it, before they were ranked for the first time. A question that this
Python's docstrings do not answer is not asked.
"""

import argparse
import logging
from collections.abc import Sequence

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.docstrings import standard_library
from bge_rerank_plugins.evaluation import JudgedSet, bm25_run, evaluate
from bge_rerank_plugins.evaluation.report import notes, table
from bge_rerank_plugins.terminal import print_table

QUESTIONS = {
    "how do I make a temporary folder that goes away afterwards": "tempfile.TemporaryDirectory",
    "copy a whole directory tree": "shutil.copytree",
    "delete a folder with everything in it": "shutil.rmtree",
    "read a CSV file with column names": "csv.DictReader",
    "turn a string into JSON": "json.dumps",
    "parse JSON text": "json.loads",
    "get all files that match a wildcard": "glob.glob glob.iglob pathlib.Path.glob",
    "count how often each word occurs": "collections.Counter",
    "wrap long text at 80 characters": "textwrap.wrap textwrap.fill",
    "remove common leading whitespace": "textwrap.dedent",
    "pick a random item from a list": "random.choice random.Random.choice",
    "shuffle a list": "random.shuffle random.Random.shuffle",
    "run an external program and get its output": "subprocess.check_output subprocess.run",
    "check whether a file exists": "os.path.exists pathlib.Path.exists os.path.isfile pathlib.Path.is_file",
    "split a file name and its extension": "os.path.splitext posixpath.splitext",
    "sleep for some seconds": "time.sleep asyncio.sleep",
    "current date and time": "datetime.datetime.now",
    "sort a list without changing it": "builtins.sorted",
    "zip files into an archive": "zipfile.ZipFile.write zipfile.ZipFile shutil.make_archive",
    "unpack an archive": "shutil.unpack_archive",
    "download a web page": "urllib.request.urlopen urllib.request.urlretrieve",
    "escape special characters in HTML": "html.escape",
    "encode bytes as base64": "base64.b64encode",
    "find the largest items of a list": "heapq.nlargest",
    "cache the results of a function": "functools.lru_cache functools.cache",
    "time how long a piece of code takes": "timeit.timeit timeit.Timer.timeit",
    "print a data structure nicely": "pprint.pprint pprint.PrettyPrinter pprint.pp",
    "compute the median of numbers": "statistics.median",
    "square root": "math.sqrt",
    "greatest common divisor": "math.gcd",
    "all combinations of two lists": "itertools.product",
    "start a thread": "threading.Thread threading.Thread.start",
    "wait until all threads are finished": "threading.Thread.join",
    "run a coroutine from normal code": "asyncio.run",
    "parse command line arguments": "argparse.ArgumentParser",
    "set the default logging level": "logging.basicConfig logging.Logger.setLevel",
    "replace text by a regular expression": "re.sub",
    "split a string by a pattern": "re.split",
    "compare two files for equality": "filecmp.cmp",
    "show the differences between two texts": "difflib.unified_diff difflib.ndiff difflib.context_diff",
    "hash a password": "hashlib.scrypt hashlib.pbkdf2_hmac crypt.crypt",
    "send an email": "smtplib.SMTP.sendmail smtplib.SMTP.send_message",
    "walk through all files below a directory": "os.walk",
    "get the value of an environment variable": "os.getenv",
    "read a config file": "configparser.RawConfigParser.read",
    "save a Python object to a file": "pickle.dump",
    "format a date as text": "datetime.date.strftime time.strftime",
    "generate a unique id": "uuid.uuid4 uuid.uuid1",
    "absolute path of a file": "os.path.abspath posixpath.abspath pathlib.Path.absolute pathlib.Path.resolve",
    "guess the type of a file from its name": "mimetypes.guess_type",
    "round a number": "builtins.round",
    "ask the user for input": "builtins.input",
    "ask for a password without showing it": "getpass.getpass getpass.unix_getpass",
    "open a web page in the browser": "webbrowser.open",
    "how much space is left on the disk": "shutil.disk_usage",
    "find an executable on the path": "shutil.which",
    "run several calls in parallel in worker processes": "multiprocessing.pool.Pool multiprocessing.pool.Pool.map",
    "make a class with fields automatically": "dataclasses.dataclass",
    "merge sorted lists": "heapq.merge",
    "number of processors": "os.cpu_count multiprocessing.cpu_count",
    "capitalize the first letter of a string": "builtins.str.capitalize",
    "remove spaces at both ends of a text": "builtins.str.strip",
    "join strings with a separator": "builtins.str.join",
    "add an item at the end of a list": "builtins.list.append",
    "remove duplicates from a list": "builtins.set",
    "look up a key and give a default if it is missing": "builtins.dict.get builtins.dict.setdefault",
    "loop over a list with the index": "builtins.enumerate",
    "go through two lists at the same time": "builtins.zip",
    "add up all the numbers": "builtins.sum math.fsum",
    "is any of these true": "builtins.any",
    "number of items in a container": "builtins.len",
    "convert a number to hexadecimal": "builtins.hex builtins.float.hex",
    "make a new directory": "os.mkdir os.makedirs pathlib.Path.mkdir",
    "rename a file": "os.rename pathlib.Path.rename os.replace",
    "delete a file": "os.remove os.unlink pathlib.Path.unlink",
    "change the permissions of a file": "os.chmod pathlib.Path.chmod",
    "names of everything in a directory": "os.listdir os.scandir pathlib.Path.iterdir",
    "which folder am I in": "os.getcwd pathlib.Path.cwd",
    "my home directory": "os.path.expanduser posixpath.expanduser pathlib.Path.home",
    "put together parts of a path": "os.path.join posixpath.join pathlib.PurePath.joinpath",
    "size of a file in bytes": "os.path.getsize genericpath.getsize",
    "read all the text of a file": "pathlib.Path.read_text",
    "send a signal to a process": "os.kill subprocess.Popen.send_signal",
    "stop the program": "sys.exit builtins.exit",
    "do something when the program ends": "atexit.register",
    "average of a list of numbers": "statistics.mean statistics.fmean",
    "standard deviation": "statistics.stdev statistics.pstdev",
    "logarithm to base two": "math.log2",
    "angle in degrees from radians": "math.degrees",
    "round a number up": "math.ceil",
    "exact arithmetic with fractions": "fractions.Fraction",
    "decimal numbers without rounding errors": "decimal.Decimal",
    "draw several different items from a population at random": "random.sample random.Random.sample",
    "make the random numbers repeatable": "random.seed random.Random.seed",
    "secure random token for a password reset": "secrets.token_urlsafe secrets.token_hex secrets.token_bytes",
    "insert into a list that stays sorted": "bisect.insort bisect.insort_right bisect.insort_left",
    "queue between threads": "queue.Queue queue.SimpleQueue",
    "keep other threads out while I change something": "threading.Lock threading.RLock",
    "call a function later in another thread": "threading.Timer",
    "thread pool": "concurrent.futures.ThreadPoolExecutor multiprocessing.pool.ThreadPool",
    "run coroutines at the same time and collect the results": "asyncio.gather",
    "give up waiting after some seconds": "asyncio.wait_for asyncio.timeout",
    "fill in some arguments of a function beforehand": "functools.partial",
    "combine all items of a list into one value": "functools.reduce",
    "group items that follow each other by a key": "itertools.groupby",
    "all orderings of a list": "itertools.permutations",
    "chain several lists into one iterator": "itertools.chain",
    "make an independent copy of nested objects": "copy.deepcopy",
    "read the source code of a function": "inspect.getsource",
    "print the stack trace of the last error": "traceback.print_exc",
    "find out where a program spends its time": "cProfile.run profile.run cProfile.Profile",
    "step through code in a debugger": "pdb.set_trace builtins.breakpoint",
    "compress bytes": "zlib.compress gzip.compress bz2.compress lzma.compress",
    "open a gzip file": "gzip.open gzip.GzipFile",
    "split a URL into its parts": "urllib.parse.urlparse urllib.parse.urlsplit",
    "quote special characters in a URL": "urllib.parse.quote",
    "is this IP address private": "ipaddress.ip_address",
    "connect to a database file": "sqlite3.connect",
    "parse an XML document": "xml.etree.ElementTree.parse xml.dom.minidom.parse",
    "how many days does a month have": "calendar.monthrange",
    "is it a leap year": "calendar.isleap",
    "mock an object in a test": "unittest.mock.Mock unittest.mock.patch",
    "check that a call raises an exception": "unittest.case.TestCase.assertRaises",
    "ignore an exception": "contextlib.suppress",
    "make a context manager from a generator": "contextlib.contextmanager",
    "redirect what is printed to a file": "contextlib.redirect_stdout",
    "version of the Python interpreter": "platform.python_version",
    "name of this computer": "platform.node socket.gethostname",
    "serve the files of a directory over HTTP": "http.server.SimpleHTTPRequestHandler",
}
"""Questions, and the names that answer each, separated by spaces; some are found under one of them only."""


def judged_set() -> JudgedSet:
    """The questions that this Python's documentation answers."""
    passages = {found.name: f"{found.name}\n{found.text}" for found in standard_library()}
    answers = {question: [name for name in names.split() if name in passages] for question, names in QUESTIONS.items()}
    qrels = {question: dict.fromkeys(names, 1) for question, names in answers.items() if names}
    return JudgedSet(name="plain questions", queries={each: each for each in qrels}, passages=passages, qrels=qrels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of BM25 and of BM25 with a reranker."""
    parser = argparse.ArgumentParser(description="BM25 and a reranker on questions in plain words.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--top-k", type=int, default=20, help="candidates for each question (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=112, help="of a pair, in tokens (default: %(default)s)")
    asked = parser.parse_args(arguments)
    logging.getLogger("bge_rerank_plugins").setLevel("ERROR")  # it warns of passages that are cut, which is meant here
    data = judged_set()
    with Scorer(asked.model, max_length=asked.max_length) as scorer:
        report = evaluate(data, bm25_run(data, asked.top_k), {asked.model: scorer}, first_stage="BM25")
    print(f"{len(data.queries)} questions, {len(data.passages):,} passages")
    print_table(*table(report))
    print(*notes(report), sep="\n")


if __name__ == "__main__":
    main()
