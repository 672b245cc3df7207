"""Text as users have it: other scripts, emoji, control characters, and the special tokens spelled out."""

from hypothesis import strategies as st

SPECIAL = st.sampled_from(["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<bos>", "<eos>", "[SEP]", "\n", "A: ", "B: "])
SCRIPTS = st.sampled_from(["熊猫", "パンダ", "панда", "الباندا", "ปันดา", "पांडा", "🐼", "👩‍👩‍👧"])
CONTROLS = st.sampled_from(["e\u0301", "\u200b", "\x00", "\x1b[0m"])
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = st.sampled_from(["panda", "what is", "a string", " ", "  ", "Sichuan.", "\t", "datetime"])

texts = st.lists(st.one_of(WORDS, SPECIAL, SCRIPTS, CONTROLS, CHARACTERS), max_size=12).map("".join)
