"""`aligner preferences`: rows for preference training, from answers and their corrections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from aligner_middleware.cli.arguments import (
    JsonOption,
    ModelOption,
    PrecisionOption,
    RayAddressOption,
    RayWorkersOption,
    UpstreamOption,
    UrlModelOption,
    UrlOption,
    aligner_recipe,
    choice,
)
from aligner_middleware.cli.output import write, write_json
from aligner_middleware.cli.progress import resumable, showing
from aligner_middleware.errors import MissingExtraError, UpstreamError

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.data.prompts import Prompt
    from aligner_middleware.rlhf.preferences import PreferenceSummary


def preferences(
    prompts: Annotated[
        Path, typer.Argument(help="Lines of text, or JSON lines with question (or prompt), maybe answer.")
    ],
    out: Annotated[Path, typer.Argument(help="File for the rows: prompt, chosen, rejected.")],
    upstream: UpstreamOption = None,
    model: ModelOption = "default",
    precision: PrecisionOption = None,
    url: UrlOption = None,
    url_model: UrlModelOption = None,
    form: Annotated[
        str, typer.Option(metavar="messages|text", help="Form of the rows: messages, for chat models, or texts.")
    ] = "messages",
    sft: Annotated[
        Path | None, typer.Option(help="File for the answers that the aligner kept, as rows for SFT.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Prompts in work at the same time; on Ray, in each worker.")
    ] = 8,
    ray_workers: RayWorkersOption = None,
    ray_address: RayAddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make preference data: a model's answer is rejected, the aligner's correction of it is chosen.

    TRL's DPO and reward trainers read the rows. Repeat the command to resume an interrupted job. Prompts that fail three
    times are named; the rows of the others are written, and the same command asks the failed ones again.
    """
    from aligner_middleware.data.prompts import read_prompts
    from aligner_middleware.rlhf.preferences import Form

    options: dict[str, Any] = {
        "form": choice(form, get_args(Form), "--form"),
        "sft": sft,
        "concurrency": concurrency,
    }
    asked, load = read_prompts(prompts), aligner_recipe(model, precision, url, url_model)
    if ray_workers is None:
        result = _make(asked, out, load, upstream, options)
    else:
        options |= {"workers": ray_workers, "address": ray_address}
        result = _make_on_ray(asked, out, load, upstream, options)
    if as_json:
        counts = {"pairs": result.pairs, "kept": result.kept, "repeated": result.repeated}
        write_json(counts | {"failed": len(result.failed)})
    else:
        write(f"{out}: {result.pairs} pairs; {result.kept} answers were kept, {result.repeated} pairs were repeated")
    if result.failed:
        raise UpstreamError(len(result.failed), next(iter(result.failed.values())))


def _make(
    prompts: list[Prompt], out: Path, load: Callable[[], Aligner], upstream: str | None, options: dict[str, Any]
) -> PreferenceSummary:
    from aligner_middleware.data.upstream import chat_model
    from aligner_middleware.rlhf.preferences import make_preferences

    answering = chat_model(upstream) if upstream else None
    with load() as aligner, resumable(), showing("preferences", "prompts") as report:
        return make_preferences(prompts, out, aligner, answering, upstream_name=upstream, **options, report=report)


def _make_on_ray(
    prompts: list[Prompt], out: Path, load: Callable[[], Aligner], upstream: str | None, options: dict[str, Any]
) -> PreferenceSummary:
    try:
        from aligner_middleware.rlhf.ray import make_preferences_on_ray
    except ImportError as exc:
        raise MissingExtraError("aligner preferences --ray-workers", "ray") from exc
    with resumable(), showing("preferences", "prompts") as report:
        return make_preferences_on_ray(prompts, out, load, upstream, **options, report=report)
