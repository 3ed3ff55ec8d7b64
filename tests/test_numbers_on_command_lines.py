"""Proved here: no command line takes a number that is infinite, no number, negative or beyond reason; each is refused
with words that name the option, before anything is run or written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from helpers.names import naming

from lightning_decentral.commands import compare, plan
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench import command as bench
from lightning_decentral.lab.emulation import command as emulate

PLAN = ["--parameters", "1e6", "--workers", "4", "--compute", "100ms", "--bandwidth", "1gbit"]
COMPARE = ["-c", "there-is-no-such-file.yaml"]
EMULATE = ["--hosts", "2", "--", "there-is-no-such-program"]
HUGE = "9" * 400

WHOLE = ("inf", "nan", "-1", "0", "1e400", "1e300", "2.5", HUGE, "many", "")
SECONDS = ("inf", "nan", "infs", "nans", "-1s", "1e400s", "1e300s", "1e-300s", f"{HUGE}s", "1e400min", "")
RATES = ("nan", "nanbit", "-1gbit", "1e400bit", "1e300bit", "1e-300bit", f"{HUGE}gbit", "infgbit", "")
FACTORS = ("1:inf", "1:nan", "1:-2", "1:0", "1:1e400", "1:1e300", f"1:{HUGE}", f"{HUGE}:2", "-1:2", "nan:2", "1:", ":2")
HOSTS = (
    *("1:slowdown=inf", "1:slowdown=nan", "1:slowdown=-1", "1:cpu=inf%", "1:cpu=nan", "1:delay=1e400s"),
    f"{HUGE}:cpu=1",
)

CASES: list[tuple[Callable[[list[str]], int], list[str], str, Sequence[str]]] = [
    (plan.main, PLAN, "--parameters", WHOLE),
    (plan.main, PLAN, "--workers", (*WHOLE, "1e9")),
    (plan.main, PLAN, "--dtype-bytes", (*WHOLE, "1e9")),
    (plan.main, PLAN, "--compute", SECONDS),
    (plan.main, PLAN, "--latency", SECONDS),
    (plan.main, PLAN, "--bandwidth", (*RATES, "0gbit")),
    (plan.main, PLAN, "--slow", FACTORS),
    (plan.main, PLAN, "--slow-link", FACTORS),
    (bench.main, ["--contenders", "none"], "--workers", WHOLE),
    (bench.main, ["--contenders", "none"], "--rounds", WHOLE),
    (bench.main, ["--contenders", "none"], "--steps", WHOLE),
    (bench.main, ["--contenders", "none"], "--warm-up", [value for value in WHOLE if value != "0"]),
    (bench.main, ["--contenders", "none"], "--seconds", (*SECONDS, "0s")),
    (bench.main, ["--contenders", "none"], "--model-bytes", WHOLE),
    (bench.main, ["--contenders", "none"], "--batch-size", WHOLE),
    (bench.main, ["--contenders", "none"], "--compute", SECONDS),
    (bench.main, ["--contenders", "none"], "--seed", [value for value in WHOLE if value != "0"]),
    (bench.main, ["--contenders", "none"], "--timeout", (*SECONDS, "0s")),
    (emulate.main, EMULATE, "--hosts", (*WHOLE, "1000")),
    (emulate.main, EMULATE, "--rate", RATES),
    (emulate.main, EMULATE, "--delay", SECONDS),
    (emulate.main, EMULATE, "--host", HOSTS),
    (emulate.main, EMULATE, "--timeout", SECONDS),
    (emulate.main, EMULATE, "--grace", SECONDS),
    (emulate.main, EMULATE, "--kill", [f"1@{value}" for value in SECONDS] + ["0-99999999999@1s"]),
    (emulate.main, EMULATE, "--stop", [f"1@1s..{value}" for value in SECONDS] + [f"{HUGE}@1s..2s"]),
    (compare.main, COMPARE, "--workers", (*WHOLE, "1e9")),
    (compare.main, COMPARE, "--epochs", WHOLE),
    (compare.main, COMPARE, "--seeds", [value for value in WHOLE if value != "0"]),
    (compare.main, COMPARE, "--slow", FACTORS),
    (compare.main, COMPARE, "--compute", ("inf", "nan", "-1", "1e400", "1e300", HUGE, "")),
    (compare.main, COMPARE, "--target", ("loss=nan", "loss=inf", "loss=1e400", "loss=", "loss", "=1")),
]


@pytest.mark.parametrize(
    ("command", "options", "option", "values"), CASES, ids=[f"{case[0].__module__}{case[2]}" for case in CASES]
)
def test_it_is_refused_with_words(
    command: Callable[[list[str]], int], options: list[str], option: str, values: Sequence[str]
) -> None:
    split = options.index("--") if "--" in options else len(options)
    for value in values:
        with naming(f"{option}={value}"):
            with pytest.raises(ConfigurationError) as error:
                command([*options[:split], f"{option}={value}", *options[split:]])
            message = str(error.value)
            assert option in message or "Cluster(" in message or "host" in message
            assert "need" in message
            assert len(message) < 600


def test_nothing_takes_no_time() -> None:
    """A cluster without limits: no number of the table is infinite divided by infinite."""
    assert plan.main([*PLAN, "--compute", "0s", "--bandwidth", "inf"]) == 0
