"""Check that the tests find faults: put one at a time into a copy of the code, and run the tests.

    python tests/tools/mutations.py [number ...]      (about ten seconds each)

A row of MUTATIONS is a file of flare_exp, a piece of it, what replaces it, and the test file that
must fail. The working tree is not changed. The exit code is 1 if a fault survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# bytecode of the libraries is kept between the faults
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(ROOT / ".pytest_cache" / "bytecode"),
}

MUTATIONS: list[tuple[str, str, str, str]] = [
    # the paper's equations
    (
        "flare/fusion.py",
        "return torch.where(source_mask[..., None], self.combine(source, target), target)",
        "return self.combine(source, target)",
        "flare/test_fusion.py",
    ),
    (
        "flare/fusion.py",
        "source, target = self.f(source), self.f(target)",
        "source = self.f(source)",
        "flare/test_fusion.py",
    ),
    ("flare/fusion.py", " / math.sqrt(query.shape[-1])", "", "flare/test_fusion.py"),
    (
        "flare/fusion.py",
        "some = masks.any(0)",
        "some = masks.all(0)",
        "flare/test_several_sources.py",
    ),
    (
        "flare/source_states.py",
        'index + (self.source_layer == "ahead")',
        "index",
        "flare/test_invariants.py",
    ),
    (
        "flare/source_states.py",
        "mask[:, index] & inside",
        "mask[:, index]",
        "flare/test_invariants.py",
    ),
    (
        "flare/source_states.py",
        "if not self._allowed:",
        "if False:",
        "flare/test_invariants.py",
    ),
    (
        "flare/peft_method.py",
        "up(bottleneck) * module.scaling[active_adapter]",
        "up(bottleneck)",
        "flare/test_invariants.py",
    ),
    ("flare/peft_method.py", "        self._refuse_merge()\n", "", "flare/test_invariants.py"),
    # data
    ("data/sampling.py", 'f"{self.seed}-{self.epoch}"', 'f"{self.seed}"', "data/test_data.py"),
    (
        "data/sampling.py",
        '"taken": self.taken // self.batch_sampler.passes',
        '"taken": self.taken',
        "experiment/test_resuming.py",
    ),
    (
        "data/source_augmentation.py",
        'f"{self.seed}-{epoch}-{row}"',
        'f"{self.seed}-{row}"',
        "data/test_data.py",
    ),
    (
        "data/source_augmentation.py",
        "while examples[other] == examples[row]:",
        "while other == row:",
        "data/test_data.py",
    ),
    (
        "data/temperature.py",
        "math.log(size) / temperature",
        "math.log(size) * temperature",
        "data/test_temperature.py",
    ),
    (
        "data/pairing.py",
        ", more=pairs[taken[i]].more",
        "",
        "data/test_data.py",
    ),
    (
        "data/question_answering.py",
        "range(min(longest, width))",
        "range(min(longest + 1, width))",
        "data/test_preprocessing.py",
    ),
    (
        "data/question_answering.py",
        "last > answer.start",
        "last >= answer.start",
        "data/test_preprocessing.py",
    ),
    # training
    (
        "training/global_batch.py",
        "total * whole.parts / max(1, whole.terms)",
        "total / count.clamp(min=1)",
        "training/test_parallel.py",
    ),
    (
        "training/distillation.py",
        "self.weight * t**2 *",
        "self.weight *",
        "training/test_distillation.py",
    ),
    (
        "training/consistency.py",
        "self.kl * divergence * mask.any(1)",
        "self.kl * divergence",
        "training/test_consistency.py",
    ),
    # translation
    (
        "translation/projection.py",
        "    while kind.mark.search(context):",
        "    if kind.mark.search(context):",
        "translation/test_projection.py",
    ),
    (
        "translation/noise.py",
        'elif error == "drop" and (kept or rest):',
        'elif error == "drop":',
        "translation/test_translation.py",
    ),
    (
        "translation/noise.py",
        "cut = len(before[-1]) if before and not text[start - 1].isspace() else 0",
        "cut = 0",
        "tasks/test_tasks.py",
    ),
    # scores and statistics
    (
        "tasks/metrics.py",
        "present[present < len(labels)]",
        "present",
        "tasks/test_metrics.py",
    ),
    (
        "tasks/metrics.py",
        "default=0.0) for p, golds",
        "default=1.0) for p, golds",
        "tasks/test_metrics.py",
    ),
    (
        "report/statistics.py",
        "np.arange(len(values), 0, -1)",
        "len(values)",
        "report/test_statistics.py",
    ),
    (
        "report/statistics.py",
        "return f1.sum(axis=1) / present.sum(axis=1)",
        "return f1.mean(axis=1)",
        "report/test_statistics.py",
    ),
    ("report/statistics.py", "(equal.sum(axis=1) - 1) / 2", "0", "report/test_statistics.py"),
    (
        "experiment/stages/ensemble.py",
        "-round(distance, 9)",
        "0",
        "experiment/test_stages.py",
    ),
    # keys and the store
    (
        "experiment/context.py",
        '"clip": cfg.trainer.gradient_clip_val,\n',
        "\n",
        "experiment/test_keys.py",
    ),
    (
        "experiment/context.py",
        "[p.source for p in pairs if p.source],",
        "[],",
        "experiment/test_keys.py",
    ),
    (
        "artifacts.py",
        'elif (place / name).stat().st_size != expected["bytes"] or file_sha256(\n'
        "                    place / name\n"
        '                ) != expected["sha256"]:',
        'elif (place / name).stat().st_size != expected["bytes"]:',
        "test_artifacts.py",
    ),
    (
        "artifacts.py",
        "        left.pop().rename(folder)",
        "        folder = left.pop()",
        "test_artifacts.py",
    ),
    (
        "utils/leases.py",
        "holder_is_gone(self.path) or now - self._since > self.duration * MARGIN",
        "holder_is_gone(self.path)",
        "test_leases.py",
    ),
    ("experiment/run_state.py", "if lease.is_held:", "if True:", "test_leases.py"),
    # languages
    (
        "experiment/stages/ensemble.py",
        "mean_of([task.score(own, examples) for own in said])[task.metric]",
        "task.score(next(said), examples)[task.metric]",
        "experiment/test_stages.py",
    ),
    # use of a run
    (
        "serving/batching.py",
        "if not future.done():\n                batch",
        "if True:\n                batch",
        "serving/test_app.py",
    ),
]


def run(number: int) -> tuple[bool, float]:
    """Run the tests of one mutation in a copy; return whether they failed, and the seconds."""
    file, before, after, tests = MUTATIONS[number]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("flare_exp", "conf", "tests", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        path = copy / "flare_exp" / file
        code = path.read_text()
        if before not in code:
            raise SystemExit(f"mutation {number}: {file} no longer has {before!r}")
        path.write_text(code.replace(before, after, 1))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                f"tests/{tests}",
            ],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": folder, **ENVIRONMENT},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"mutation {number}: pytest ended with {done.returncode}\n{done.stdout}")
    return done.returncode == 1, time.perf_counter() - start


def main(chosen: list[int]) -> int:
    """Print a row for each mutation; return 1 if one survived."""
    survived = []
    for number in chosen or range(len(MUTATIONS)):
        file, before, after, tests = MUTATIONS[number]
        killed, seconds = run(number)
        if not killed:
            survived.append(number)
        result = "killed" if killed else "SURVIVED"
        change = f"{' '.join(before.split())!r} -> {after.strip()!r}"
        print(f"{number:2} {result:8} {seconds:5.1f} s  {file}: {change} ({tests})", flush=True)
    print(f"{len(survived)} survived: {survived}" if survived else "none survived")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main([int(text) for text in sys.argv[1:]]))
