"""Generations that a server elsewhere runs, which speaks OpenAI's API: completions with token ids (vLLM, SGLang), or chat.

It knows token ids and no text, as the engine does, whose `Generation` it fills; only to a chat model are these ids bytes of
messages (`chat.py`). The rest of the package uses `scheduler.py`.
"""
