"""The local engine: token ids in, scores out. Knows nothing of LangChain, LlamaIndex, HTTP or the command line."""
