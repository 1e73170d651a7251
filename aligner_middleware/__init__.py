"""Correct every answer of a LangChain model: `chain = llm | AlignerRunnable()`."""

__version__ = "0.1.0"
