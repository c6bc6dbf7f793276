"""The scripts of sweeps/ that read runs: cells that differ are told apart, and figures are drawn from what is there."""

import importlib.util
import json

import pytest

from flare_exp import config


def script(name):
    path = config.conf_dir().parent / "sweeps" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder, method, score, mt="gold", noise=0.0, chrf=None, seed=0, **source):
    metrics = {
        "task": "toy_sentiment", "lang": "far", "model": "tiny", "method": method, "mt": mt, "seed": seed,
        "fusion": None if method == "lora" else "add_relu", "test": {"accuracy": 0.1, "macro_f1": score},
        "english": {"accuracy": 0.9, "macro_f1": 0.9}, "seconds": {"transfer": 1.0},
        "translation": {"noise": noise, "chrf++": {} if chrf is None else {"en": chrf + 5, "far": chrf}},
        "source": {"shuffle": False, "empty": False, **source},
    }  # fmt: skip
    place = folder / f"{method}-{mt}-{noise}-{chrf}-{seed}-{'-'.join(source)}"
    place.mkdir(parents=True)
    (place / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        run(tmp_path, "lora", 0.4 + seed / 10, seed=seed)
        run(tmp_path, "flare", 0.8 + seed / 10, seed=seed)
        for mt_score in (60.0, 90.0):
            for method, score in (("lora", 0.3), ("flare", 0.6), ("flare_mt", 0.5)):
                run(tmp_path, method, score, "toy_nllb", chrf=mt_score, seed=seed)
        run(tmp_path, "flare", 0.35, "toy_nllb", chrf=90.0, seed=seed, shuffle=True)
        for method, score in (("lora", 0.2), ("flare", 0.5)):
            run(tmp_path, method, score, noise=0.4, chrf=50.0, seed=seed)
    return tmp_path


def test_gains_are_over_lora_on_the_same_translations_and_seed(runs):
    plot = script("plot_mt")
    gains = plot.gains(plot.read(runs))["toy_sentiment"]
    by_label = {label: points for (_, _, label), points in gains.items()}
    assert set(by_label) == {"FLARE", "FLARE MT", "FLARE, another example's source"}
    assert by_label["FLARE"] == {100.0: [pytest.approx(40)] * 2, 60.0: [pytest.approx(30)] * 2, 90.0: [pytest.approx(30)] * 2}
    assert by_label["FLARE MT"][60.0] == [pytest.approx(20)] * 2
    assert by_label["FLARE, another example's source"][90.0] == [pytest.approx(5)] * 2
    noisy = {label: points for (_, _, label), points in plot.noisy(plot.read(runs))["toy_sentiment"].items()}
    assert noisy["LoRA"] == {0.0: [pytest.approx(40), pytest.approx(50)], 40.0: [pytest.approx(20)] * 2}


def test_the_figures_are_drawn(runs, capsys):
    pytest.importorskip("matplotlib")
    script("plot_mt").main(runs)
    for name in ("gain_by_quality.png", "noise.png"):
        assert (runs / name).stat().st_size > 5000
        assert name in capsys.readouterr().out or name == "noise.png"


def test_the_table_tells_translations_apart(runs):
    summarise = script("summarise")
    cells = {summarise.cell(metrics)[2:] for metrics in script("plot_mt").read(runs)}
    assert ("gold", "lora") in cells
    assert ("gold, 40% noise, chrF++ 50", "lora") in cells
    assert ("toy_nllb, chrF++ 90", "flare_mt (add_relu)") in cells
    assert ("toy_nllb, chrF++ 60", "flare_mt (add_relu)") in cells
    assert ("toy_nllb, chrF++ 90", "flare (add_relu, shuffle source)") in cells
