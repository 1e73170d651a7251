"""Generations that a server elsewhere runs, which speaks OpenAI's completions API with token ids: vLLM, SGLang.

It knows token ids and no text, as the engine does, whose `Generation` it fills. The rest of the package uses `scheduler.py`.
"""
