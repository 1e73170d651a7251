"""A plug-in aligner for LangChain."""
