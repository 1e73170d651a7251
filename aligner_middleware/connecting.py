"""An address to an aligner that a server runs: tokenizer, template and thresholds come from here, its tokens from there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from aligner_middleware.checkpoints.prompted import prompted_text
from aligner_middleware.checkpoints.text import AlignerText, text_of
from aligner_middleware.engine.threads import refuse_green_threads
from aligner_middleware.errors import InputError, RemoteError
from aligner_middleware.loading import Loaded
from aligner_middleware.locations import PROMPTED
from aligner_middleware.remote.chat import Chat
from aligner_middleware.remote.scheduler import RemoteScheduler
from aligner_middleware.text.template import PromptTemplate, special_token_id

KEY_VARIABLE = "ALIGNER_API_KEY"
_SAMPLE = "The quick brown fox jumps over 13 lazy dogs, and says: naïve façades.\n"


def connect(
    url: str | Sequence[str],
    aligner: str,
    *,
    template: str | PromptTemplate | None,
    model: str | None,
    api_key: str | None,
    concurrency: int,
    patience: float,
    silence: float,
    draft: bool,
) -> Loaded:
    """Connect to the servers that run an aligner, and check that it is that one; see `Aligner.connect`."""
    refuse_green_threads()
    urls = _checked(url)
    for name, value in (("concurrency", concurrency), ("silence", silence), ("patience", patience)):
        if value < 0 or (value == 0 and name != "patience"):
            raise InputError(f"{name} is {value!r}, expected {'at least' if name == 'patience' else 'above'} 0")
    is_prompted = aligner == PROMPTED
    if is_prompted and template is not None:
        raise InputError(f"template is {template!r}, but {aligner!r} has a prompt of its own: leave it out")
    text = prompted_text() if is_prompted else text_of(aligner, template)
    key = api_key or os.environ.get(KEY_VARIABLE)
    options: dict[str, Any] = {"model": model, "key": key, "concurrency": concurrency}
    options |= {"patience": patience, "silence": silence}
    options |= {"speak": cache(partial(Chat, predicts=draft)) if is_prompted else None}
    scheduler = RemoteScheduler(urls, frozenset(text.eos_token_ids), **options)
    try:
        scheduler.connect(text.max_positions)
        if not is_prompted:
            _check_tokenizer(scheduler, text)
    except BaseException:
        scheduler.close()
        raise
    return Loaded(
        model=scheduler,
        tokenizer=text.tokenizer,
        template=text.template,
        eos_token_ids=text.eos_token_ids,
        name=text.name,
        precision=None,
        revision=f"{text.revision} {scheduler.model}",
        calibration=text.calibration,
    )


def _checked(url: str | Sequence[str]) -> list[str]:
    urls = [url] if isinstance(url, str) else list(url)
    for one in urls:
        if not isinstance(one, str) or not one.startswith(("http://", "https://")):
            raise InputError(
                f"url is {one!r}, expected one that begins with http:// or https://, as http://localhost:8000/v1"
            )
    if not urls or len(set(urls)) < len(urls):
        raise InputError(f"url is {urls!r}, expected at least one address, and none twice")
    return [one.rstrip("/") for one in urls]


def _check_tokenizer(scheduler: RemoteScheduler, text: AlignerText) -> None:
    """Check that token ids mean the same on the servers as here, where they encode texts at all.

    Raises:
        RemoteError: If they do not.
    """
    template, tokenizer = text.template, text.tokenizer
    names = [*template.special_tokens, *(template.verdicts or ()), *filter(None, [template.mark, template.end_token])]
    expected = {_SAMPLE: tokenizer.encode(_SAMPLE)}
    expected |= {name: [special_token_id(tokenizer, template, name)] for name in names}
    for sample, ids in expected.items():
        for url, said in scheduler.tokenize(sample).items():
            if said != ids:
                raise RemoteError(
                    f"{url} serves {scheduler.model!r}, whose tokenizer is not that of the aligner {text.name!r}: "
                    f"{sample!r} is {said[:12]} there, and {ids[:12]} here; serve the checkpoint that was made of it"
                )
