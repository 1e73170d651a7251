"""An aligner's place in LangChain: chains, chat models, agents. Knows messages and no token."""
