"""What the docs say of lines, rules, files and flags is held against the code that has them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import arguments
from core.settings import VERSION

ROOT = Path(__file__).parents[3]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / ".github").rglob("*.md"))]
OPERATIONS = ROOT / "docs" / "operations.md"
LEVELS = {"debug": "", "info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR", "log": ""}
VALUE = re.compile(r"%[-\d.]*[a-z]")  # in a log call's text
SHELL_VALUE = re.compile(r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+|\$\*")
# Of programs that are not ours.
TOOLS = {
    "--unix-socket",
    "--no-install-recommends",
    "--availability",
    "--config",
    "--storage",
    "--tail",
    "--web",
    "--save",
    "--force",
    *("--name", "--network", "--build-arg", "--driver", "--attachable", "--internal", "--cap-drop"),  # of docker
    "--fast",  # of tests/run.sh
    "--update-golden",  # of pytest
}
PASSED_ON = ("NetfilterError", "TakenOver")  # errors whose words are logged as they are


def pattern(text: str, value: re.Pattern[str]) -> re.Pattern[str]:
    """What a text looks like once its values are in."""
    return re.compile("(.*)".join(map(re.escape, value.split(text))))


def nodes(folder: str) -> Iterator[ast.AST]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text()))


def logged(folder: str) -> Iterator[tuple[str, str]]:
    """(level, text) of every log call there; the level is empty where it depends."""
    for node in nodes(folder):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=how), args=args) if how in LEVELS:
                texts = [a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                assert len(texts) == 1, f"a log call whose text is no literal: {ast.unparse(node)}"
                if texts[0] != "%s":
                    yield LEVELS[how], texts[0]


def passed_on(folder: str) -> Iterator[tuple[str, str]]:
    """The words of the errors that are logged as they are, with their values as a log call has them."""
    for node in nodes(folder):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[ast.JoinedStr(values=parts)])) if (
                name in PASSED_ON
            ):
                yield "ERROR", "".join(str(p.value) if isinstance(p, ast.Constant) else "%s" for p in parts)


def supervised() -> Iterator[tuple[str, str]]:
    """The lines that the supervisor adds to the manager's log."""
    yield from re.findall(r"T (ERROR) +(.*?)\\n'", (ROOT / "manager" / "supervise.sh").read_text())


def documented(heading: str) -> list[tuple[str, str]]:
    """(level, line) of each row of the table under that heading."""
    section = OPERATIONS.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| (INFO|WARNING|ERROR) \| `([^`]+)` \|", section, re.MULTILINE)


LOGS = {
    "Every line of manager.log": [*logged("manager"), *passed_on("manager"), *supervised()],
    "Every line of the balancer's log": [*logged("balancer"), *passed_on("balancer")],
}


def is_documented(level: str, text: str, row: tuple[str, str]) -> bool:
    return level in ("", row[0]) and pattern(text, VALUE).fullmatch(row[1]) is not None


@pytest.mark.parametrize("heading", LOGS)
def test_every_line_that_is_logged_is_explained_with_its_level(heading: str) -> None:
    rows = documented(heading)
    assert [line for line in LOGS[heading] if not any(is_documented(*line, row) for row in rows)] == []


@pytest.mark.parametrize("heading", LOGS)
def test_every_line_that_is_explained_is_logged(heading: str) -> None:
    assert [row for row in documented(heading) if not any(is_documented(*line, row) for line in LOGS[heading])] == []


def refusals() -> Iterator[re.Pattern[str]]:
    """What run.sh and stop.sh end with: `die` in the shell, and errors whose class is Failed in Python."""
    for path in (ROOT / "run.sh", ROOT / "stop.sh", *(ROOT / "manager").glob("*.sh")):
        for text in re.findall(r'\bdie "([^"]+)"', path.read_text()):
            yield pattern(text, SHELL_VALUE)
    for node in nodes("manager/cli"):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id="Failed"), args=[ast.Constant(value=str(text)), *_])):
                yield pattern(text, VALUE)
            case ast.Raise(exc=ast.Call(func=ast.Name(id="Failed"), args=[ast.JoinedStr(values=parts), *_])):
                yield pattern("".join(str(p.value) if isinstance(p, ast.Constant) else "%s" for p in parts), VALUE)


def test_every_refusal_of_the_scripts_is_explained() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", OPERATIONS.read_text(), re.MULTILINE)
    found = list(refusals())
    missing = [refusal.pattern for refusal in found if not any(refusal.fullmatch(row) for row in rows)]
    assert (sorted(missing), len(found) > 20) == ([], True)


def test_every_relative_link_leads_to_a_file() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    here = [(page, link) for page, link in links if not re.match(r"[a-z]+:", link)]
    assert [f"{page.name}: {link}" for page, link in here if not (page.parent / link).is_file()] == []
    assert here


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))


def known() -> set[str]:
    """The flags of run.sh, of the scripts as their heads list them, of the tests' programs, and of what rules say."""
    parsers = (arguments.run_parser(), arguments.stop_parser())
    ours = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for script in (ROOT / "tests").glob("*/run.sh"):
        ours |= flags("".join(line for line in script.read_text().splitlines(keepends=True) if line.startswith("#")))
    for program in (ROOT / "tests").glob("*/*.py"):
        ours |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', program.read_text()))
    for text in (ROOT / "tests" / "unit" / "balancer" / "golden").glob("*.rules"):
        ours |= flags(text.read_text())
    # Words of iptables and conntrack that are only in code.
    return ours | flags((ROOT / "balancer" / "netfilter.py").read_text()) | {"--comment", "--notrack"} | TOOLS


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "grafana.json"], ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page: Path) -> None:
    assert flags(page.read_text()) - known() == set()


def test_every_rule_of_ours_that_is_quoted_is_rendered() -> None:
    golden = set()
    for path in (ROOT / "tests/unit/balancer/golden").glob("*.rules"):
        # The page names the bridge and the network of the host path by variables.
        text = path.read_text().replace("br-0123456789ab", "BR").replace("198.18.0.0/20", "NET")
        golden.update(text.splitlines())
    quoted = re.findall(r"^ +(-A (?:LB-.*|.* -j LB-\S+))$", (ROOT / "docs" / "packets.md").read_text(), re.MULTILINE)
    assert ([rule for rule in quoted if rule not in golden], len(quoted) > 10) == ([], True)


def test_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert re.fullmatch(rf"{re.escape(VERSION)} \(\d{{4}}-\d\d-\d\d\)", released[0])


def test_pre_commit_runs_every_linter_of_the_tests() -> None:
    script = (ROOT / "tests" / "run.sh").read_text()
    linters = set(re.findall(r'^say "(.*hadolint)"$', script, re.MULTILINE)[0].split(", "))
    names = set(re.findall(r"name: ([\w-]+)", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert (names, len(linters)) == (linters, 5)
