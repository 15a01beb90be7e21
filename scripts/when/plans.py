"""What scripts/study_when.py runs: regimes with a uniform run each, and ways to weigh in them."""

from typing import NamedTuple

REFERENCE = "REFERENCE"  # in the flags of a branch: the run folder of its regime's reference
DOMAINS = 7


class Regime(NamedTuple):
    """How uniform runs are made, and where they branch."""

    flags: dict = {}  # of train.py, beside those of the plan
    data: str = "bytes"  # a key of DATA in scripts/study_when.py
    tokens_per_domain: int = 0  # only the first ones of each domain; 0: all
    branch: int = 0  # 0: that of the plan


class Setting(NamedTuple):
    """A row of the table: a way to weigh, in a regime."""

    axis: str
    label: str
    weights: dict  # flags of train.py from the branch on
    regime: str = "base"
    branch: int = 0  # 0: that of the regime
    read_at: int = 0  # step whose validation loss counts; 0: the last
    controls: tuple[str, ...] = ("shuffled",)


class Plan(NamedTuple):
    """A study. The rows come in the order in which they are run."""

    config: list[str]  # config files of train.py
    flags: dict  # of train.py, for all runs
    branch: int
    regimes: dict[str, Regime]
    settings: list[Setting]

    def start(self, setting: Setting) -> int:
        """The step at which a row branches."""
        return setting.branch or self.regimes[setting.regime].branch or self.branch


LINUPPER = {"reweight": "linupper"}
BAND = {"reweight": "band"}
QUADRATIC = {"reweight": "quadratic"}
EXTREMES = {"reweight": "extremes"}
MILD = {"r": 1.0}
EXCESS = {"reweight_ref": REFERENCE}
PER_BYTE = {"reweight_unit": "byte"}
TO_UNIFORM = {"r": 4.0, "r_start": 0.4, "r_steps": 200}
BOTH = ("shuffled", "within")


def cpu_plan() -> Plan:
    """Three hours of a CPU core: bytes and 0.1M parameters, where no row says otherwise."""
    steps, G, T = 600, 16, 128
    per_domain = steps * G * T // DOMAINS  # tokens that a run draws
    flags = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "global_batch_size": G,
        "block_size": T,
        "learning_rate": 2e-3,
        "max_steps": steps,
        "warmup_steps": 30,
        "eval_interval": 50,
        "eval_windows": 64,
        "checkpoint_interval": 100,
        "device": "cpu",
    }
    return Plan(["config/tiny_cpu.py"], flags, 200, cpu_regimes(per_domain), cpu_settings())


def cpu_regimes(per_domain: int) -> dict[str, Regime]:
    """per_domain: tokens of a domain that a run of the base draws."""
    return {
        "base": Regime(),
        "labelled corpus": Regime(data="sample"),
        "0.3 epochs": Regime(tokens_per_domain=per_domain * 10 // 3),
        "1 epoch": Regime(tokens_per_domain=per_domain),
        "3 epochs": Regime(tokens_per_domain=per_domain // 3),
        "10 epochs": Regime(tokens_per_domain=per_domain // 10),
        "30 epochs": Regime(tokens_per_domain=per_domain // 30),
        "AdamW, rate 1e-3": Regime({"learning_rate": 1e-3}),
        "AdamW, rate 4e-3": Regime({"learning_rate": 4e-3}),
        "Muon, rate 8e-3": Regime({"optimizer": "muon", "learning_rate": 8e-3}),
        "Muon, rate 2.4e-2": Regime({"optimizer": "muon", "learning_rate": 2.4e-2}),
        "windows in file order": Regime({"data_order": "file"}),
        "T = 512": Regime({"block_size": 512, "global_batch_size": 8, "eval_windows": 24}),
        "1,800 steps, rate to 0": Regime({"max_steps": 1800, "min_lr": 0}, branch=600),
        "GPT-2 tokens": Regime(
            {"max_steps": 200, "global_batch_size": 8, "eval_windows": 16}, "gpt2", branch=100
        ),
        "0.8M parameters": Regime({"n_layer": 4, "n_head": 4, "n_embd": 128}),
        "4.9M parameters": Regime(
            {
                "n_layer": 6,
                "n_head": 4,
                "n_embd": 256,
                "max_steps": 200,
                "learning_rate": 1e-3,
            },
            branch=100,
        ),
    }


def cpu_settings() -> list[Setting]:
    """The most telling rows first."""
    return [
        Setting("strategy", "linupper", LINUPPER, controls=BOTH),
        Setting("reference", "linupper, excess loss", LINUPPER | EXCESS, controls=BOTH),
        Setting("reference", "linupper, excess loss, r = 1", LINUPPER | EXCESS | MILD),
        Setting("reference", "band, excess loss", BAND | EXCESS),
        Setting("temperature", "linupper, r = 1", LINUPPER | MILD),
        Setting("strategy", "quadratic", QUADRATIC),
        Setting("strategy", "extremes", EXTREMES),
        Setting("strategy", "band", BAND),
        Setting("stage", "linupper, steps 100 to 200", LINUPPER, branch=100, read_at=200),
        Setting("stage", "linupper, steps 200 to 300", LINUPPER, read_at=300),
        Setting("stage", "linupper, steps 500 to 600", LINUPPER, branch=500),
        in_regime("labelled corpus", "linupper", LINUPPER),
        in_regime("labelled corpus", "band", BAND),
        in_regime("labelled corpus", "linupper, excess loss", LINUPPER | EXCESS),
        in_regime("0.3 epochs", "linupper", LINUPPER, "repeated data"),
        in_regime("1 epoch", "linupper", LINUPPER, "repeated data"),
        in_regime("3 epochs", "linupper", LINUPPER, "repeated data"),
        in_regime("10 epochs", "linupper", LINUPPER, "repeated data"),
        in_regime("30 epochs", "linupper", LINUPPER, "repeated data"),
        Setting("schedule", "linupper, r = 0.4 to 4 in 200 steps", LINUPPER | TO_UNIFORM),
        Setting("normalization", "linupper, quantile", LINUPPER | {"reweight_norm": "quantile"}),
        Setting("normalization", "linupper, domain", LINUPPER | {"reweight_norm": "domain"}),
        Setting("normalization", "linupper, weights up to 2", LINUPPER | {"max_weight": 2.0}),
        in_regime("AdamW, rate 1e-3", "linupper", LINUPPER, "optimizer"),
        in_regime("AdamW, rate 4e-3", "linupper", LINUPPER, "optimizer"),
        in_regime("Muon, rate 8e-3", "linupper", LINUPPER, "optimizer"),
        in_regime("Muon, rate 2.4e-2", "linupper", LINUPPER, "optimizer"),
        in_regime("windows in file order", "linupper", LINUPPER, "order"),
        in_regime("GPT-2 tokens", "linupper, loss per token", LINUPPER, "unit"),
        in_regime("GPT-2 tokens", "linupper, loss per byte", LINUPPER | PER_BYTE, "unit"),
        in_regime("T = 512", "linupper", LINUPPER, "length"),
        in_regime("1,800 steps, rate to 0", "linupper", LINUPPER, "annealing"),
        in_regime("0.8M parameters", "linupper", LINUPPER, "size"),
        in_regime("0.8M parameters", "linupper, excess loss", LINUPPER | EXCESS, "size"),
        in_regime("4.9M parameters", "linupper", LINUPPER, "size"),
    ]


def in_regime(regime: str, weights: str, flags: dict, axis: str = "") -> Setting:
    """A row of a regime other than the base; axis "": of the same name."""
    return Setting(axis or regime, f"{regime}: {weights}", flags, regime)


def h100_plan() -> Plan:
    """25 minutes of an H100 for each seed: GPT-2 124M, T = 512, G = 32, branches from 350 steps."""
    steps, G, T = 700, 32, 512
    flags = {
        "model": "124m",
        "block_size": T,
        "global_batch_size": G,
        "dropout": 0.0,
        "max_steps": steps,
        "warmup_steps": 100,
        "eval_interval": 350,
        "eval_windows": 32,
        "checkpoint_interval": 350,
        "device": "cuda",
        "compile": "off",  # to compile takes longer than it saves in 350 steps
    }
    regimes = {
        "base": Regime(data="gpt2"),
        "10 epochs": Regime(data="gpt2", tokens_per_domain=steps * G * T // DOMAINS // 10),
        "windows in file order": Regime({"data_order": "file"}, "gpt2"),
    }
    settings = [
        Setting("strategy", "linupper, loss per token", LINUPPER),
        Setting("unit", "linupper, loss per byte", LINUPPER | PER_BYTE),
        Setting("reference", "linupper, excess loss", LINUPPER | EXCESS),
        in_regime("10 epochs", "linupper", LINUPPER, "repeated data"),
        in_regime("windows in file order", "linupper", LINUPPER, "order"),
        Setting("strategy", "band", BAND),
        Setting("reference", "linupper, excess loss, r = 1", LINUPPER | EXCESS | MILD),
        Setting("strategy", "quadratic", QUADRATIC),
    ]
    return Plan([], flags, 350, regimes, settings)


PLANS = {"cpu": cpu_plan, "h100": h100_plan}
