"""What the documents say of the tree holds: links, paths, the version, the licence and what continuous integration calls."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from sere_autotune.tuning.file import load_spec
from sere_ext import __version__
from sere_ext.contract import records
from sere_ext.contract.errors import ExitCode
from sere_operator.plan.objects.children import Defaults
from tests.kit import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").glob("*/README.md"), *(ROOT / "helm").rglob("*.md")]
)
# A path in a document is one of the repository or of a package; what commands make lies in these folders.
BASES = (ROOT, ROOT / "sere_ext", ROOT / "autotune", ROOT / "operator", ROOT / "helm")
MADE = ("build/", "runs/", "dist/", ".venv", "docs/benchmarks/results", "sere_ext/sere_ext/built")
C_SOURCES = (".h", ".cu", ".cpp")  # their macros are no variables
FORBIDDEN = ("operator/__init__.py", "tests/operator/__init__.py")
PATH = re.compile(r"`([\w.-]+(?:/[\w.*-]+)+/?)`")
TOP = {path.name for base in BASES for path in base.iterdir() if path.is_dir() and not path.name.startswith(".")}


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(linked), f"{target}: that page has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    named = [path for path in PATH.findall(page.read_text()) if path.split("/")[0] in TOP and not path.startswith(MADE)]
    gone = [path for path in named if not any(list(base.glob(path)) for base in (*BASES, page.parent))]
    assert [path for path in gone if path not in FORBIDDEN] == [], "moved or gone"


def test_the_exit_codes_of_the_reference_are_those_of_the_commands() -> None:
    _, _, section = (ROOT / "docs/reference.md").read_text().partition("## Exit codes\n")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", section.partition("\n## ")[0], flags=re.MULTILINE)
    assert rows == [(str(code.value), code.meaning) for code in ExitCode]


def test_packages_that_would_hide_the_standard_library_are_not_there() -> None:
    assert not [path for path in FORBIDDEN if (ROOT / path).exists()], "`operator` would be this folder for every import"


def test_the_version_stands_in_one_place_and_the_rest_agrees() -> None:
    chart = yaml.safe_load((ROOT / "helm/sere-operator/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert Defaults().engine_image == f"sere-engine:{__version__}"
    base = (ROOT / "manifests/base/operator.yaml").read_text()
    assert set(re.findall(r"app\.kubernetes\.io/version: \"(.+)\"", base)) == {__version__}
    assert set(re.findall(r"sere-(?:operator|engine):([\w.]+)", base)) == {__version__}
    for file in (ROOT / "images").glob("*.Dockerfile"):
        assert set(re.findall(r"-t sere-\w+:(\d[\d.]*\d)", file.read_text())) == {__version__}, file.name
    assert f"\n## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_whole_text_of_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.split()) > 1500


def test_continuous_integration_and_hooks_call_what_exists() -> None:
    made = set(re.findall(r"^([a-z- ]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    targets = {target for line in made for target in line.split()}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {word for line in lines for word in line.partition("make ")[2].split()}
    assert called
    assert called <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "a hook of elsewhere would have to be fetched"
    for hook in hooks[0]["hooks"]:
        for path in re.findall(r"tests/\S+\.py", hook["entry"]):
            assert (ROOT / path).exists()


def test_the_page_of_environment_variables_is_whole_and_names_no_dead_one() -> None:
    page = (ROOT / "docs/environment.md").read_text()
    described = set(re.findall(r"`(SERE_[A-Z_]+)(?:=\S+)?`", page))
    folders = (
        "sere_ext",
        "autotune",
        "operator",
        "demo",
        "benchmarks",
        "images",
        "helm/sere-operator/templates",
        "tests/kit",
        ".ci",
    )
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in C_SOURCES]
    files += [ROOT / "Makefile", ROOT / "tests" / "run", *(ROOT / "tests").glob("*/conftest.py")]
    texts = [path.read_text() for path in files if path.suffix not in (".so", ".pyc")]
    used = {name for text in texts for name in re.findall(r"\bSERE_[A-Z_]*[A-Z]\b", text)}
    assert used - described == set(), "describe it in docs/environment.md"
    assert described - used == set(), "nothing reads it any more"


def test_the_reference_tells_the_forms_of_items_as_the_reader_has_them() -> None:
    assert records.described() in (ROOT / "docs/reference.md").read_text(), "paste the words of records.described()"
    for name in (*records.PROMPT_COLUMNS, records.ANSWER_COLUMN):
        assert f"`{name}`" in records.described()


def test_the_page_of_environment_variables_names_those_of_other_programs_too() -> None:
    """Every name that the product or the demo looks up or sets in its process's environment by a literal."""
    page = (ROOT / "docs/environment.md").read_text()
    used: set[str] = set()
    for folder in ("sere_ext", "autotune", "operator", "demo"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                used |= _variables(node)
    assert "XDG_STATE_HOME" in used and "CXX" in used
    described = set(re.findall(r"`([A-Z][A-Za-z_]*_[A-Za-z_]+|[A-Z]{3,})`", page))
    assert used - described - {"SERE_PROFILE"} == set(), "describe it in docs/environment.md"


def _variables(node: ast.AST) -> set[str]:
    """Literals by which a piece of syntax asks a mapping named `environ` for a value or sets one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "setdefault", "pop"):
        asked, keys = node.func.value, node.args[:1]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "getenv":
        return {key.value for key in node.args[:1] if isinstance(key, ast.Constant)}
    elif isinstance(node, ast.Subscript):
        asked, keys = node.value, [node.slice]
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        asked, keys = node.comparators[0], [node.left]
    else:
        return set()
    name = asked.attr if isinstance(asked, ast.Attribute) else asked.id if isinstance(asked, ast.Name) else ""
    return {str(key.value) for key in keys if isinstance(key, ast.Constant)} if name == "environ" else set()


def test_each_folder_says_in_one_sentence_what_it_is_for_and_architecture_repeats_it() -> None:
    table = dict(re.findall(r"^\| `(sere_[\w/]+)` \| (.+) \|$", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.MULTILINE))
    folders = {}
    for package in ("sere_ext/sere_ext", "autotune/sere_autotune", "operator/sere_operator"):
        for init in sorted((ROOT / package).glob("**/*/__init__.py")):
            said = ast.get_docstring(ast.parse(init.read_text()))
            assert said, f"{init} needs a docstring of one sentence"
            folders[str(init.parent.relative_to((ROOT / package).parent))] = said
    assert table == folders


def test_the_tuning_file_of_the_first_page_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```yaml\n(model: .+?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "tuning.yaml").write_text(block)
    monkeypatch.chdir(tmp_path)
    spec = load_spec(Path("tuning.yaml"), {})
    assert (spec.model, spec.accuracy.max_drop_points) == ("Qwen/Qwen3-30B-A3B", 1.0)
