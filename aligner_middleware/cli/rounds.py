"""`aligner rounds`: multi-round RLHF on an aligner's corrections."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from aligner_middleware.cli.arguments import (
    JsonOption,
    JudgeOption,
    ModelOption,
    PrecisionOption,
    judge_named,
    precision_of,
)
from aligner_middleware.cli.options import options_from
from aligner_middleware.cli.output import write, write_json
from aligner_middleware.cli.progress import resumable, showing
from aligner_middleware.errors import MissingExtraError
from aligner_middleware.evaluation.stop_rules import StopRules
from aligner_middleware.training.config import PolicyConfig

if TYPE_CHECKING:
    from aligner_middleware.data.prompts import Prompt
    from aligner_middleware.rlhf.round_results import Rounds


@options_from(StopRules, "rules")
@options_from(PolicyConfig, "config", {"policy": ["base"]})
def rounds(
    prompts: Annotated[Path, typer.Argument(help="Prompts to learn from, in the forms of `aligner preferences`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run.")],
    config: PolicyConfig,
    rules: StopRules,
    held_out: Annotated[
        Path | None, typer.Option(help="Prompts that are only scored. By default every fifth of PROMPTS.")
    ] = None,
    model: ModelOption = "default",
    precision: PrecisionOption = None,
    count: Annotated[int, typer.Option("--rounds", min=1, help="Number of rounds.")] = 3,
    judge: JudgeOption = None,
    fixed: Annotated[
        bool, typer.Option("--fixed-preferences", help="The control: every round learns from the first one's pairs.")
    ] = False,
    beside: Annotated[Path | None, typer.Option(help="Folder of another run, drawn into the same plot.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Multi-round RLHF: a policy answers, the aligner corrects, and the pairs train the next policy.

    Each round's answers, pairs, adapter and scores stay in its folder in OUT. Repeat the command to resume an interrupted
    run, also with more rounds. Policies are compared with the first one on held-out prompts: by the judge, and by KL, length,
    distinct n-grams and refusals. When one breaks a stop rule the run ends, and the best round is one before it.
    """
    try:
        from aligner_middleware.rlhf.plot import draw_rounds
        from aligner_middleware.rlhf.round_results import read_rounds, summary
        from aligner_middleware.rlhf.rounds import run_rounds
    except ImportError as exc:
        raise MissingExtraError("aligner rounds", "train") from exc
    from aligner_middleware.aligner import Aligner

    learnt, unseen = _prompts(prompts, held_out)
    other = read_rounds(beside) if beside else None
    judging = judge_named(judge)
    with (
        Aligner.load(model, precision=precision_of(precision)) as aligner,
        resumable(),
        showing("rounds") as report,
    ):
        run = run_rounds(
            learnt, unseen, out, aligner, judging, config, rounds=count, rules=rules, fixed=fixed, report=report
        )
    draw_rounds({str(place): one for place, one in ((out, run), (beside, other)) if one}, out / "rounds.png")
    if as_json:
        write_json(summary(run))
    else:
        _print_rounds(run, out)


def _prompts(path: Path, held_out: Path | None) -> tuple[list[Prompt], list[Prompt]]:
    """Read the prompts to learn from and the held-out ones; without a file of these, every fifth is held out."""
    from aligner_middleware.data.prompts import read_prompts

    prompts = read_prompts(path)
    if held_out:
        return prompts, read_prompts(held_out)
    unseen = prompts[::5]
    kept_apart = {prompt.question for prompt in unseen}
    return [prompt for prompt in prompts if prompt.question not in kept_apart], unseen


def _print_rounds(run: Rounds, out: Path) -> None:
    table = Table("round", "pairs", "kept", *(run.rounds[0].metrics.verdicts if run.rounds[0].metrics else ()))
    for name in ("KL", "words", "distinct 3-grams", "refusals"):
        table.add_column(name, no_wrap=True)
    for one in run.rounds:
        cells = [str(one.number), str(one.pairs), str(one.kept)] if one.number else ["0", "", ""]
        if one.metrics:
            metrics = one.metrics
            cells += ["" if math.isnan(tally.rate) else f"{tally.rate:+.1%}" for tally in metrics.verdicts.values()]
            cells += [
                f"{metrics.kl:.3f}",
                f"{metrics.words:.0f}",
                f"{metrics.distinct[3]:.1%}",
                f"{metrics.refusals:.1%}",
            ]
        table.add_row(*cells)
    write(table)
    for reason in run.stopped:
        write(f"stopped after round {run.rounds[-1].number}: {reason}")
    place = f"{out}/round-{run.best}/adapter" if run.best else "the first policy"
    write(f"best: {place}; {out}/rounds.png shows the rounds")
