"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from aligner_middleware.artifact import Precision
from aligner_middleware.locations import cache_dir, cached_folder, exported_folder
from aligner_middleware.strength import LEVELS

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.evaluation.pairwise import PairwiseJudge
    from aligner_middleware.strength import Strength

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="`default`, an exported folder, a checkpoint's folder, or a hub id.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="float32|float16|int8|int4",
        help="Precision of the weights; float16 is for GPUs. By default int8, or that of the exported folder.",
    ),
]
UrlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        help="Address of a server that runs the aligner, such as http://localhost:8000/v1; may be repeated. Its key comes "
        "from ALIGNER_API_KEY. --model is the same aligner here, for its tokenizer and thresholds; or `prompted`, for a chat "
        "model that is asked in words.",
    ),
]
UrlModelOption = Annotated[
    str | None,
    typer.Option(
        "--url-model", help="Name that the server at --url gives the model. By default the first that it serves."
    ),
]
UpstreamOption = Annotated[
    str | None,
    typer.Option(
        "--upstream",
        help="Chat model that answers: file.py:name, module:name, or a name that init_chat_model takes (openai:gpt-5).",
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", help="Chat model that judges, named like --upstream. By default the offline judge."),
]
ConcurrencyOption = Annotated[
    int, typer.Option("--concurrency", min=1, help="Calls of a chat model that run at the same time.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RayWorkersOption = Annotated[
    int | None, typer.Option("--ray-workers", min=1, help="Number of workers on Ray, each with models of its own.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="Address of a Ray cluster, or `auto`. By default a new one on this machine."),
]


def choice(value: str, known: Sequence[Any], option: str) -> Any:
    """Give one of the values that an option may have.

    Raises:
        typer.BadParameter: If it is none of them.
    """
    if value in known:
        return value
    raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}{near(value, known)}", param_hint=option)


def near(value: str, known: Sequence[str]) -> str:
    """Ask, as the end of a message, whether the nearest known value was meant; empty where none is like it."""
    matches = get_close_matches(value, known, 1)
    return f"; did you mean {matches[0]}?" if matches else ""


def precision_of(value: str | None) -> Precision | None:
    """Read the value of --precision.

    Raises:
        typer.BadParameter: If there is no such precision.
    """
    chosen: Precision | None = None if value is None else choice(value, get_args(Precision), "--precision")
    return chosen


def strength_of(value: str) -> Strength:
    """Read the value of --strength: a level's name, or a threshold from 0 on.

    Raises:
        typer.BadParameter: If it is neither.
    """
    for known in LEVELS:
        if value == known:
            return known
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise typer.BadParameter(
            f"{value!r} is none of low, medium and high, and no number from 0 on{near(value, LEVELS)}",
            param_hint="--strength",
        )
    return number


def aligner_recipe(
    model: str,
    precision: str | None,
    urls: list[str] | None = None,
    url_model: str | None = None,
    instruction: str | None = None,
) -> Callable[[], Aligner]:
    """Make the function that gives a command its aligner: loaded by --model and --precision, or connected to at --url.

    Workers on other machines call it, too: it can be pickled. It raises as `Aligner.load` and `Aligner.connect` do.

    Raises:
        typer.BadParameter: If there is no such precision, or an option has no meaning with --url or without it.
    """
    from aligner_middleware.aligner import Aligner

    chosen = precision_of(precision)
    if not urls:
        if url_model:
            raise typer.BadParameter("names a server's model: give its address by --url", param_hint="--url-model")
        return partial(Aligner.load, model, precision=chosen, instruction=instruction)
    if chosen:
        raise typer.BadParameter("a server runs the weights that it has: leave it out", param_hint="--precision")
    return partial(Aligner.connect, urls, model, model=url_model, instruction=instruction)


def aligner_folder(model: str, precision: str | None) -> Path:
    """Find the exported folder of a model: the model itself, or its folder in the cache."""
    return exported_folder(model) or cached_folder(model, precision_of(precision) or "int8")


def judge_named(name: str | None, concurrency: int = 8) -> PairwiseJudge:
    """Make the pairwise judge that --judge names; the offline one where it names none.

    Raises:
        MissingExtraError: If the judge needs packages that are not installed.
        BuildError: If the offline judge's sentence encoder cannot be loaded.
    """
    from aligner_middleware.evaluation.pairwise import ChatJudge, OfflineJudge

    if name is None:
        from aligner_middleware.evaluation.sentence_encoder import SentenceEncoder

        return OfflineJudge(SentenceEncoder())
    from aligner_middleware.data.upstream import chat_model

    return ChatJudge(chat_model(name), name, cache_dir() / "verdicts.sqlite", concurrency)
