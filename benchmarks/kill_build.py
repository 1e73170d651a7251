"""Kill builds, exports, trainings, preferences and rounds at random moments, and see what is left and that a repeat succeeds.

    python benchmarks/kill_build.py [--moments 50] [--seed 0] [--jobs build,export,train,preferences,rounds] [--default]

Each job runs once undisturbed, and tells of every stage as it begins: what it reports itself, and every rename and
removal of a folder, before and after which it pauses, so that the moments between them are hit, too. Then it is killed
(SIGKILL) at moments drawn evenly over its stages. After each kill nothing may be seen half-written, and nothing that
was there may be lost. The same job, repeated, must succeed and give what the undisturbed run gave, and no temporary
folder may be left. The jobs run on small random models, forked from a process that has loaded everything; `--default`
builds the default aligner instead, base weights included, which takes a minute or more for each moment. Prints a line
for each moment, and JSON at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from safetensors.torch import load_file

from aligner_middleware.artifact import Artifact
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.data.triples import Triple
from aligner_middleware.export.store import export_model
from aligner_middleware.locations import cached_folder
from aligner_middleware.rlhf.preferences import make_preferences
from aligner_middleware.rlhf.rounds import run_rounds
from aligner_middleware.training import Stage, TrainConfig, train
from tests.fakes import InstantAligner
from tests.integration.conftest import random_checkpoint
from tests.integration.test_rounds import HELD_OUT, JUDGE, LENIENT, PROMPTS, checkpoint, config

PAUSE = 0.05  # seconds before and after each rename and removal
ROWS = [Triple(question=f"question {number}", answer="bad", correction=f"good {number}") for number in range(24)]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A job that is killed.

    Attributes:
        prepare: Lays out an empty folder before it.
        run: Does it; told of stages.
        whole: Sees that what it has made is whole, as far as it is there, and gives what can be compared.
    """

    prepare: Callable[[Path], object]
    run: Callable[[Path, Tell], object]
    whole: Callable[[Path], Any]


def jobs(models: Path, default: bool) -> dict[str, Job]:
    """Make the jobs, on models in a folder."""
    small = str(random_checkpoint("llama", models / "llama"))
    policy = config(checkpoint(models / "policy"), method="sft")
    model = "default" if default else small

    def build(folder: Path, tell: Tell) -> None:
        export_model(model, report=lambda at: tell(at.stage))

    def built(folder: Path) -> Any:
        found = cached_folder(model, "int8")
        return files_of(found, Artifact.load(found)) if found.exists() else None

    def old_export(folder: Path) -> None:
        (folder / "out").symlink_to("real")  # a link is kept
        export_model(small, folder / "real", "float32")

    def export(folder: Path, tell: Tell) -> None:
        export_model(small, folder / "out", report=lambda at: tell(at.stage))

    def exported(folder: Path) -> Any:
        found = folder / "real"
        if not found.exists():  # killed between two renames: the old one is not lost, and comes back
            found = folder / ".real.aligner-new" / "replaced"
        return files_of(found, Artifact.load(found))

    def training(folder: Path, tell: Tell) -> None:
        stage = Stage(epochs=1, learning_rate=1e-3)
        settings = TrainConfig(base=small, warm_up=stage, correction=stage, bfloat16=False, save_steps=2)
        train(ROWS, folder / "out", settings, report=lambda at: tell(f"{at.stage} step"))

    def trained(folder: Path) -> Any:
        found = folder / "out"
        if not found.exists():
            return None
        json.loads((found / "training.json").read_text())
        return weights_of(found / "adapter_model.safetensors")

    def slowly(question: str, answer: str) -> str:
        time.sleep(0.01)
        return f"good answer to {question}"

    def preferences(folder: Path, tell: Tell) -> None:
        asked = [prompt.question for prompt in PROMPTS]
        make_preferences(
            [Prompt(question=q, answer="bad" if at % 3 else f"good answer to {q}") for at, q in enumerate(asked)],
            folder / "out.jsonl",
            InstantAligner(slowly),
            sft=folder / "sft.jsonl",
            concurrency=1,
            report=lambda at: tell("corrections"),
        )

    def preferred(folder: Path) -> Any:
        found = []
        for name in ("out.jsonl", "sft.jsonl"):
            if (folder / name).exists():
                rows = [json.loads(line) for line in lines(folder / name)]
                found.append([{key: value for key, value in row.items() if key != "provenance"} for row in rows])
        return found

    def rounds(folder: Path, tell: Tell) -> None:
        aligner = InstantAligner(lambda question, answer: f"good answer to {question}")
        run_rounds(
            PROMPTS[:8],
            HELD_OUT[:3],
            folder / "out",
            aligner,
            JUDGE,
            policy,
            rounds=2,
            rules=LENIENT,
            report=lambda at: tell(at.stage),
        )

    def ran(folder: Path) -> Any:
        found = folder / "out"
        for path in found.glob("round-*/[!.]*.json*"):
            for text in lines(path) if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(text)
        adapters = {str(path): weights_of(path / "adapter_model.safetensors") for path in found.glob("round-*/adapter")}
        summary = found / "summary.json"
        return (json.loads(summary.read_text()), [*adapters.values()][-1]) if summary.exists() else None

    return {
        "build": Job(lambda folder: None, build, built),
        "export": Job(old_export, export, exported),
        "train": Job(lambda folder: None, training, trained),
        "preferences": Job(lambda folder: None, preferences, preferred),
        "rounds": Job(lambda folder: None, rounds, ran),
    }


def lines(path: Path) -> list[str]:
    """Give the lines of a file; `splitlines` would also split at what a random model writes."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def files_of(folder: Path, artifact: Artifact) -> dict[str, str]:
    """Give the digests of an aligner's files, which are checked when it is loaded."""
    return artifact.files


def weights_of(path: Path) -> dict[str, list[float]]:
    """Give sums of weights, which tell one training from another."""
    return {name: [round(float(value.double().sum()), 4)] for name, value in load_file(path).items()}


def start(job: Job, folder: Path) -> tuple[int, int]:
    """Fork a process that does a job; gives its id, and a pipe that it tells of its stages by."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 1
    try:
        os.close(reading)
        log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ |= {"ALIGNER_HOME": str(folder / "home"), "TMPDIR": str(folder.parent / "tmp")}
        tempfile.tempdir = None

        def tell(stage: str) -> None:
            os.write(writing, f"{stage}\n".encode())

        for place, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
            setattr(place, name, _paused(getattr(place, name), name, tell))
        tell("beginning")
        job.run(folder, tell)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _paused(original: Any, name: str, tell: Tell) -> Any:
    def paused(*arguments: Any, **options: Any) -> Any:
        tell(f"before {name}")
        time.sleep(PAUSE)
        try:
            return original(*arguments, **options)
        finally:
            tell(f"after {name}")
            time.sleep(PAUSE)

    return paused


def undisturbed(job: Job, folder: Path) -> list[tuple[str, float]]:
    """Run a job to its end, and give its stages with the seconds that each took."""
    child, pipe = start(job, folder)
    begun: list[tuple[str, float]] = []
    with os.fdopen(pipe) as stages:
        begun += ((line.strip(), time.perf_counter()) for line in stages)
    end = time.perf_counter()
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a job failed that nobody killed: {(folder.parent / 'log').read_text()[-3000:]}")
    ends = [*(moment for _, moment in begun[1:]), end]
    return [(stage, after - before) for (stage, before), after in zip(begun, ends, strict=True)]


def kill(job: Job, folder: Path, stage: int, delay: float) -> bool:
    """Kill a job some seconds after its n-th stage began; whether it was still there to be killed."""
    child, pipe = start(job, folder)
    with os.fdopen(pipe) as stages:
        for at, _ in enumerate(stages):
            if at == stage:
                time.sleep(delay)
                break
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def left_over(folder: Path) -> list[str]:
    """List temporary folders and files, and unfinished runs."""
    ends = (".aligner-new", ".run", ".journal")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name.endswith(ends))


def main() -> None:
    """Run each job undisturbed, then kill it at its share of the moments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default="build,export,train,preferences,rounds")
    parser.add_argument("--default", action="store_true")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        names = options.jobs.split(",")
        every = jobs(Path(place) / "models", options.default)
        for at, name in enumerate(names):
            count = options.moments // len(names) + (at < options.moments % len(names))
            found += _moments(name, every[name], Path(place) / name, count, draw)
    faults = [one for one in found if one["faults"]]
    print(json.dumps({"moments": len(found), "killed": sum(one["killed"] for one in found), "faults": faults}))
    sys.exit(bool(faults))


def _moments(name: str, job: Job, place: Path, count: int, draw: random.Random) -> list[dict[str, Any]]:
    folder = fresh(place, job)
    os.environ["ALIGNER_HOME"] = str(folder / "home")
    stages = undisturbed(job, folder)
    expected = job.whole(folder)
    names = sorted({stage for stage, _ in stages})
    draw.shuffle(names)
    print(f"{name}: {sum(seconds for _, seconds in stages):.1f} s in {len(stages)} steps of {len(names)} stages")
    found = []
    for moment in range(count):
        stage = names[moment % len(names)]
        step = draw.choice([at for at, (one, _) in enumerate(stages) if one == stage])
        delay = draw.uniform(0, stages[step][1])
        folder, faults = fresh(place, job), []
        killed = kill(job, folder, step, delay)
        try:
            job.whole(folder)
        except Exception as exc:
            faults.append(f"after the kill: {type(exc).__name__}: {exc}")
        undisturbed(job, folder)
        if (result := job.whole(folder)) != expected:
            faults.append(f"repeated: {str(result)[:200]}, expected {str(expected)[:200]}")
        if left := left_over(folder):
            faults.append(f"left over: {left}")
        found.append({"job": name, "stage": stage, "seconds": round(delay, 3), "killed": killed, "faults": faults})
        print(
            f"{name}, {stage}, {delay:.3f} s: {'; '.join(faults) or 'ok'}{'' if killed else ' (it had ended)'}",
            flush=True,
        )
    return found


def fresh(place: Path, job: Job) -> Path:
    """Give a job an empty folder, with what it finds there."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("work/home", "tmp"):
        (place / name).mkdir(parents=True)
    child = os.fork()  # this process must not start the threads that torch forks badly with
    if not child:
        try:
            job.prepare(place / "work")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return place / "work"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
