"""Proved here: nothing that should be documented is missing, every example on a page and in a docstring runs, every
computed table is what the code gives now, and the site builds without a warning."""

from __future__ import annotations

import argparse
import ast
import doctest
import importlib
import importlib.util
import inspect
import logging
import multiprocessing
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from helpers.ports import free_port
from helpers.workers import kept_workers

import lightning_decentral
from lightning_decentral import algorithms
from lightning_decentral.commands.main import main as command
from lightning_decentral.compression import COMPRESSORS
from lightning_decentral.lab.bench.command import parser as race_parser
from lightning_decentral.lab.bench.contenders import CONTENDERS
from lightning_decentral.lab.results import DATA, measurements, subjects
from lightning_decentral.methods import METHODS as TABLE
from lightning_decentral.methods import PIPELINES
from lightning_decentral.topology import TOPOLOGY_NAMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SECTIONS = [
    "In one paragraph",
    "Update rule",
    "Use it",
    "What it sends",
    "Hyper-parameters",
    "Differences with the paper",
    "When not to use it",
    "Cite",
]
COMPRESSION_SECTIONS = ["Rule" if section == "Update rule" else section for section in SECTIONS]
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "results" not in page.relative_to(DOCS).parts]
OTHER_PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "clusters" / "README.md")
EXAMPLES = [*PAGES, *(page for page in OTHER_PAGES if page.exists())]
_FENCE = re.compile(r"^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
_SECONDS = 240.0  # for one page: none takes ten on two idle cores
_FEW = {"PL_TRAINER_LIMIT_TRAIN_BATCHES": "4", "PL_TRAINER_LIMIT_VAL_BATCHES": "1"}  # as users give options by default


def blocks(page: Path, language: str) -> list[tuple[str, str, int]]:
    """The code blocks of a page in one language: title (or nothing), code, and the line at which it begins."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        if match["language"] == language:
            title = re.search(r'title="([^"]+)"', match["options"])
            found.append((title[1] if title else "", match["code"], text[: match.start()].count("\n") + 1))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


MODULES = [
    module.name
    for module in pkgutil.walk_packages(lightning_decentral.__path__, "lightning_decentral.")
    if not module.name.rpartition(".")[2].startswith("_") and ".lab.benchmarks." not in module.name  # scripts
]
METHODS = {cls: getattr(algorithms, cls).__module__.rpartition(".")[2] for cls in algorithms.__all__}


def load(module: str) -> ModuleType | None:
    """Import a module; nothing if it is one that needs an optional package which is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lightning_decentral"):
            raise
        return None


def has_examples(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ">>>" in file.read_text(encoding="utf-8")


# -- what must be there -----------------------------------------------------------------------------------------------


@cache
def references() -> set[str]:
    """The names of the stacked references."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests" / "reference").glob("*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def in_a_table(cls: str, module: str) -> bool:
    """Whether a test of several methods compares this one with its reference."""
    texts = [path.read_text() for path in (ROOT / "tests" / "algorithms").glob("test_*.py")]
    return any(re.search(rf"\({cls}, \w+\.{module}, ", text) for text in texts)


@pytest.mark.parametrize(("cls", "module"), METHODS.items(), ids=METHODS.values())
def test_every_method_has_its_page_test_and_reference(cls: str, module: str) -> None:
    missing = []
    page = DOCS / "methods" / f"{module}.md"
    if not page.exists():
        missing.append(f"the page docs/methods/{module}.md")
    else:
        headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if headings != SECTIONS:
            missing.append(f"docs/methods/{module}.md with exactly the sections {SECTIONS}, got {headings}")
        if f"<!-- generated: sends {module} -->" not in page.read_text(encoding="utf-8"):
            missing.append(f"the computed table `sends {module}` in docs/methods/{module}.md")
        if not any(title for title, _, _ in blocks(page, "python")):
            missing.append(f"a complete script (python title=...) in docs/methods/{module}.md")
    if not (ROOT / "tests" / "algorithms" / f"test_{module}.py").exists() and not in_a_table(cls, module):
        missing.append(f"the test tests/algorithms/test_{module}.py")
    if module not in references():
        missing.append(f"the reference: a function {module} in tests/reference/")
    if f"lightning_decentral.algorithms.{cls}" not in (DOCS / "api" / "algorithms.md").read_text(encoding="utf-8"):
        missing.append(f"{cls} in docs/api/algorithms.md")
    assert not missing, f"{cls} lacks: " + "; ".join(missing)


@pytest.mark.parametrize("schedule", PIPELINES)
def test_every_pipeline_has_its_page(schedule: str) -> None:
    text = (DOCS / "pipelines" / f"{schedule}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert f"<!-- generated: pipeline {schedule} -->" in text
    assert PIPELINES[schedule].paper.rpartition(" ")[2] in text  # its arXiv number


def test_every_compressor_has_its_page_and_test() -> None:
    """A page may be about several; the computed table on it says which."""
    folder, described = DOCS / "compression", set[str]()
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.name != "index.md":
            headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
            assert headings == COMPRESSION_SECTIONS, f"{name(page)} needs exactly the sections {COMPRESSION_SECTIONS}"
            assert blocks(page, "python"), f"{name(page)} has no example"
        described |= set(" ".join(re.findall(r"<!-- generated: message ([\w ]+) -->", text)).split())
    assert described == set(COMPRESSORS), f"docs/compression: {described ^ set(COMPRESSORS)} on no page, or unknown"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "compression").glob("test_*.py"))
    untested = [cls.__name__ for cls in COMPRESSORS.values() if not re.search(rf"\b{cls.__name__}\b", tests)]
    assert not untested, f"tests/compression has no test of {untested}"


def test_every_topology_with_a_name_is_in_the_gallery() -> None:
    text = (DOCS / "concepts" / "gallery.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- generated: topology (\w+) -->", text)
    pictures = {path.stem for path in (DOCS / "pictures" / "topologies").glob("*.svg")}
    assert len(found) == len(set(found))
    assert set(TOPOLOGY_NAMES) < set(found) == pictures  # and some that need more than a number of workers


def test_every_registered_name_is_a_documented_method() -> None:
    assert set(TABLE) == set(METHODS.values())


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for module in MODULES:
        loaded = load(module)
        if loaded is None:
            continue
        missing += [] if inspect.getdoc(loaded) else [module]
        for own_name, value in vars(loaded).items():
            if own_name.startswith("_") or getattr(value, "__module__", None) != module:
                continue
            if inspect.isfunction(value) and not value.__doc__:
                missing.append(f"{module}.{own_name}")
            if inspect.isclass(value):
                missing += [f"{module}.{own_name}{member}" for member in _undocumented(value)]
    assert not missing, f"there is no docstring for: {', '.join(missing)}"


def _undocumented(cls: type[Any]) -> list[str]:
    """The class itself ("") and its own members that have no docstring, not even one of what they override."""
    missing = [] if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") else [""]
    inherited = {member for base in cls.__mro__[1:] for member in vars(base)}
    for member, value in vars(cls).items():
        is_code = inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))
        if is_code and not member.startswith("_") and member not in inherited and not inspect.getdoc(value):
            missing.append(f".{member}")
    return missing


def test_public_names_are_on_a_reference_page() -> None:
    """What a package exports stands on a page of the reference."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    missing = []
    for package in (
        "algorithms",
        "callbacks",
        "compression",
        "normalization",
        "optimizers",
        "strategies",
        "topology",
    ):
        module = importlib.import_module(f"lightning_decentral.{package}")
        for public in module.__all__:
            if f"lightning_decentral.{package}.{public}" not in text:
                missing.append(f"{package}.{public}")
    assert not missing, f"docs/api lacks: {', '.join(missing)}"


# -- examples run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [*filter(has_examples, MODULES)])
def test_examples_in_docstrings_run(module: str) -> None:
    loaded = load(module)
    if loaded is None:
        pytest.skip(f"{module} needs a package that is not installed")
    failed, _ = doctest.testmod(loaded)
    assert failed == 0


def run_blocks(rank: int, code: list[tuple[str, int]], page: str, folder: Path) -> None:
    """As a worker: run code blocks one after the other, as one script, on few batches."""
    os.chdir(folder)
    if not any("clients" in text for text, _ in code):  # whose epochs are rounds, which are whole
        os.environ |= _FEW
    loggers = {one: logging.getLogger(one) for one in ("lightning", "lightning.pytorch", "lightning.fabric")}
    before, main = {one: logger.level for one, logger in loggers.items()}, sys.modules["__main__"]
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    script = sys.modules["__main__"] = ModuleType("__main__")
    try:
        for text, line in code:
            exec(compile("\n" * line + text, page, "exec"), vars(script))
    finally:
        sys.modules["__main__"] = main
        for one, logger in loggers.items():
            logger.setLevel(before[one])


def run_alone(rank: int, environment: dict[str, str], code: list[tuple[str, int]], page: str, folder: Path) -> None:
    """In a child process: run code blocks, and exit with whether they passed."""
    os.environ |= environment
    status = 0
    try:
        run_blocks(rank, code, page, folder)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no clean-up of what belongs to the parent


def with_two(code: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The blocks with two workers in the place of four, if nothing else on them says that there are four."""
    fours = sum(len(re.findall(r"\b4\b", text)) for text, _ in code)
    return [(text.replace("devices=4", "devices=2"), line) for text, line in code] if fours == 1 else code


def run(code: list[tuple[str, int]], page: Path, folder: Path) -> None:
    """Run blocks of a page: where the `Trainer` has several devices, as so many workers started by hand.

    The workers are kept for all pages; Lightning starts no further processes, because it is told in the environment
    that somebody else has. `Fabric` knows of no end at which its threads could stop, so its scripts have processes that
    end with them.
    """
    code = with_two(code)
    text = "".join(text for text, _ in code)
    devices = re.search(r"devices=(\d+)", text)
    workers = int(devices[1]) if devices else 1
    if workers > 1 and "Fabric(" not in text:
        kept_workers(workers).run(run_blocks, code, str(page), folder, seconds=_SECONDS)
        return
    fork, port, processes = multiprocessing.get_context("fork"), str(free_port()), []
    for rank in range(workers):
        member = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(workers), "NODE_RANK": "0"}
        environment = member | {"LOCAL_RANK": str(rank)} if workers > 1 else {}
        processes.append(fork.Process(target=run_alone, args=(rank, environment, code, str(page), folder)))
        processes[-1].start()
    deadline = time.monotonic() + _SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{name(page)}: {len(late)} of {workers} processes were not done after {_SECONDS} s"
    assert [process.exitcode for process in processes] == [0] * workers, f"{name(page)}: see the output"


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_examples_on_pages_run(page: Path, tmp_path: Path) -> None:
    """Blocks without a title are one script together; a block with a title is a script of its own."""
    found = blocks(page, "python")
    together = [(code, line) for title, code, line in found if not title]
    if together:
        run(together, page, tmp_path)
    for title, code, line in found:
        if title:
            run([(code, line)], page, tmp_path)


def test_the_first_script_runs_as_a_user_starts_it(tmp_path: Path) -> None:
    """With `python train.py`, nothing imported and nothing set: Lightning starts the other worker itself."""
    title, code, _ = next(block for block in blocks(DOCS / "getting-started.md", "python") if block[0])
    (tmp_path / title).write_text(code)
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, title], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", [page for page in EXAMPLES if blocks(page, "bash") or blocks(page, "yaml")], ids=name)
def test_plan_commands_and_configurations_on_pages_are_accepted(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the pages name files of the repository, as clusters/two_sites.yaml
    for words in _commands(page):
        if words[:2] == ["lightning-decentral", "plan"]:
            assert command(words[1:]) == 0, f"{name(page)}: {shlex.join(words)}"
    for _, code, _ in blocks(page, "yaml"):
        assert yaml.safe_load(code), f"{name(page)} has an empty configuration"


class _Understood(BaseException):
    """A command's options were parsed; it is not run."""


def _commands(page: Path) -> list[list[str]]:
    """The command lines of a page, as words, without settings of the environment and loops of a shell."""
    lines = [line for _, code, _ in blocks(page, "bash") for line in code.replace("\\\n", " ").splitlines()]
    found = [
        shlex.split(re.split(" && | [|] ", line)[0], comments=True) for line in lines if not re.search("[;$<]", line)
    ]
    return [words for words in found if words]


def test_commands_on_pages_are_understood(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parsers of today, with files that are there; nothing is run."""
    monkeypatch.chdir(ROOT)
    within = []
    known, whole = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args

    def parse_known(self: argparse.ArgumentParser, *arguments: Any) -> Any:
        result = known(self, *arguments)
        if within:
            return result
        raise _Understood

    def parse(self: argparse.ArgumentParser, *arguments: Any) -> Any:
        within.append(self)
        try:
            whole(self, *arguments)
        finally:
            within.pop()
        raise _Understood

    pages = sorted({*EXAMPLES, *(DOCS / "results").glob("*.md"), *(ROOT / "recipes").rglob("*.md")})
    ours, lightnings = [], []
    left = list(dict.fromkeys(tuple(words) for page in pages for words in _commands(page)))
    for words in left:
        while "=" in words[0] or words[0] == "sudo":
            words = words[1:]
        named = [name for word in words for name in word.split(",")]
        missing = [
            name for name in named if re.match(r"(recipes|clusters)/[^*]+\.\w+$", name) and not Path(name).exists()
        ]
        assert not missing, f"{shlex.join(words)} names {missing}"
        if words[:3] == ("python", "-m", "lightning_decentral"):
            words = ("lightning-decentral", *words[3:])
        if words[0] == "lightning-decentral":
            (lightnings if words[1] in ("fit", "validate", "test", "predict") else ours).append(words)
        elif words[:2] == ("python", "-m") and words[2].startswith("lightning_decentral."):
            ours.append(words)
            if "--" in words:  # a measurement of another command, which is looked at in its turn
                left.append(words[words.index("--") + 1 :])
    for words in lightnings:
        monkeypatch.setattr(sys, "argv", [*words, "--print_config"])
        with pytest.raises(SystemExit) as end:
            command()
        assert end.value.code in (0, None), f"{shlex.join(words)}: {capsys.readouterr().err}"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for words in ours:
        monkeypatch.setattr(sys, "argv", list(words[2:] if words[0] == "python" else words))
        run = importlib.import_module(words[2]).main if words[0] == "python" else command
        if "argparse" not in run.__globals__ and run is not command:
            assert len(words) == 3, f"{shlex.join(words)}: {words[2]} has no options"
            continue
        try:
            with pytest.raises(_Understood):
                run()
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
    assert len(lightnings) > 15
    assert len(ours) > 60


# -- tables and links -------------------------------------------------------------------------------------------------


_SHARES = 12  # of the pages with tables, that several processes may check at the same time


def test_a_table_shows_each_column_of_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones too where two have one name: the second once showed the figures of the first."""
    monkeypatch.syspath_prepend(DOCS)
    measured = importlib.import_module("measured")
    whole = 0
    for subject in subjects(ROOT / DATA):
        newest = measurements(subject, ROOT / DATA)[0]
        for number, shown in enumerate(measured.table(subject, DOCS / "results" / "index.md").splitlines()[2:]):
            if not shown.startswith("| "):
                break
            cells = newest.tables[measured.SUBJECTS.get(subject, measured.Subject()).table].rows[number]
            if shown.count(" | ") == " | ".join(cells).count(" | "):
                assert shown == "| " + " | ".join(cells) + " |", subject
                whole += 1
    assert whole > 200


@pytest.mark.early
@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", range(_SHARES))
def test_computed_tables_are_up_to_date(
    share: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DOCS)
    generate = importlib.import_module("generate")
    pages = generate.pages()
    assert len(pages) >= len(METHODS)
    assert generate.main(["--check", *map(str, pages[share::_SHARES])]) == 0, capsys.readouterr().err


_GENERATED = re.compile(r"<!-- generated: .*?end of generated -->|<!-- figure: .*?<!-- end -->", re.DOTALL)
_NOT_MEASURED = re.compile(  # code, links, and the sections that say what papers and users choose
    r"^```.*?^```|^## (?:Hyper-parameters|Differences with the paper|Cite|Use it)\n.*?(?=^## |\Z)|`[^`]*`|\]\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)
_FIGURE = re.compile(
    r"(?<![\w.:/-])(?:\d+\.\d+(?![\w.])|\d+(?: to \d+)?(?: ?%| times\b| points?\b| seconds\b| s\b| ms\b| MB\b))"
)
_SETTINGS = re.compile(  # what was set and not measured; the 15 % are held by tests/simulation/test_measured.py
    r"Python 3\.\d+ to 3\.\d+|PyTorch \d\.\d+|Lightning \d\.\d+\.\d+|\d+ % of the values|"
    r"(?:SAEF|feedback) with \d+ %|more than 95 %|"
    r"(?:within|to) 15 %|\d+ ms (?:apart|between)|and 20 ms|hosts 5 ms|\d+ times slower|slowed \d+ times|"
    r"model of \d+ MB|0\.5 s of computing|\d+ times \(8 bits\) to 32 times \(1 bit\)|until 0\.1 % of a disagreement"
)


def typed_figures(text: str) -> list[str]:
    """Figures of a page that look measured and that nobody generates, with the words before them."""
    prose = _GENERATED.sub("", text)
    prose = _SETTINGS.sub("", " ".join(_NOT_MEASURED.sub("", prose).split()))
    return [prose[max(0, found.start() - 50) : found.end()] for found in _FIGURE.finditer(prose)]


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "README.md",
        *(DOCS / name for name in ("index.md", "getting-started.md", "how-to-choose.md", "compression/index.md")),
        *(
            page
            for room in ("methods", "results", "normalization", "optimizers")
            for page in (DOCS / room).glob("*.md")
        ),
    ],
    ids=name,
)
def test_no_figure_is_typed(page: Path) -> None:
    """Measured figures come from `results/data`, by `docs/generate.py`; so they cannot be stale or wrong."""
    typed = typed_figures(page.read_text(encoding="utf-8"))
    assert not typed, (
        f"{name(page)} got {typed}, needs figures from data: write <!-- figure: SUBJECT; ROW; COLUMN --> <!-- end --> "
        "and run python docs/generate.py. If it was set and not measured, add how it is said to _SETTINGS in this test."
    )
    at_a_start = re.findall(r"^<!-- figure: .*", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert not at_a_start, (
        f"{name(page)}: {at_a_start} begins a line, where Markdown ends the paragraph. Put it behind a word."
    )


def test_a_typed_figure_is_found() -> None:
    said = "D-PSGD is 1.5 times as fast and ends at 97 %. A step takes 3 ms. 8 hosts 50 ms apart with `0.25`."
    assert [found.split()[-1] for found in typed_figures(said)] == ["1.5", "%", "ms"]
    assert not typed_figures("It is <!-- figure: a; b; c -->2.02<!-- end --> times as fast.\n\n## Cite\n\n1.5 times")


def test_every_page_of_results_has_its_parts() -> None:
    """The claim, a table from data, the command that repeats it, and what went against us; and no page is dated."""
    folder = DOCS / "results"
    pages = [page for page in folder.glob("*.md") if page.name not in ("index.md", "how-to-read-a-race.md")]
    assert len(pages) >= 10
    shown: set[str] = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not page.name.startswith("20"), f"{name(page)}: data go to results/data, see CONTRIBUTING.md"
        assert re.match(r"# .+\n\n\*\*", text), f"{name(page)} begins with its claim, in bold"
        assert "## What went against us\n" in text, f"{name(page)} says what went against us"
        assert blocks(page, "bash"), f"{name(page)} has no command"
        shown |= set(re.findall(r"<!-- generated: result ([\w-]+) -->", text))
    every = set(subjects(ROOT / DATA))
    measured = {subject for subject in every if not subject.startswith("claim-")}  # they have a page
    assert shown - every <= {"gpu-compressors", "gpu-layers", "gpu-processes"}, "those pages say that they are not"
    assert measured <= shown, "subjects that were measured, and those on pages"


def test_commands_of_races_are_understood() -> None:
    """What the pages tell to repeat is a command of today, with contenders of today."""
    commands = [
        words[2:]
        for page in (*(DOCS / "results").glob("*.md"), ROOT / "CONTRIBUTING.md")
        for words in _commands(page)
        if words[:2] == ["lightning-decentral", "bench"]
    ]
    assert len(commands) > 10
    for arguments in commands:
        options = race_parser().parse_args(arguments)
        unknown = set((options.contenders or "all").split(",")) - {*CONTENDERS, "all"}
        assert not unknown, f"bench {shlex.join(arguments)} names {unknown}"
        assert options.cluster is None or (ROOT / options.cluster).exists()
        assert options.contenders or options.cluster, "without contenders it needs a cluster"


@pytest.mark.early
@pytest.mark.timeout(900)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links between pages, anchors, the navigation, and every name that the reference shows."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.fail("mkdocs is not installed, so the pages are not checked: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=840,  # some minutes on a machine with much else to do
    )
    assert done.returncode == 0, done.stdout + done.stderr
    served = [page for page in (tmp_path / "site").rglob("*.html") if "https://fonts" in page.read_text()]
    assert not served, "a page loads fonts from another server"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.early
@pytest.mark.timeout(900)
def test_the_pictures_are_what_the_simulator_gives_now() -> None:
    command = [sys.executable, str(DOCS / "pictures.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=840).returncode == 0, "run python docs/pictures.py"
