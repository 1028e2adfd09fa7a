"""What the documents say is what the code does."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from scripts import parameter_docs
from spark3r_ros.config import Config, NodeConfig, node_parameters, parameters

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_parameter_tables_are_up_to_date():
    written = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert written == parameter_docs.page(), "run scripts/parameter_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    folders = "spark3r_ros|launch|config|docs|scripts|benchmarks|training|test|requirements"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text)
    targets = [page.parent / link for link in links if "://" not in link] + [ROOT / path for path in paths]
    missing = [str(target.relative_to(ROOT)) for target in targets if not target.exists()]
    assert not missing, f"{page.name} names files that are not there: {missing}"


README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACE = re.compile(r"`(spark3r_ros/[\w/]+\.py):([\w.]+)`")


def defines(path, name):
    """Whether a file defines a function, class or method of this dotted name."""
    found = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = next((node for node in found.body if isinstance(node, kinds) and node.name == part), None)
        if found is None:
            return False
    return True


def rows_of(head):
    """Cells of the README's table whose head begins with this word."""
    table = re.search(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_the_readme_walk_exists_and_is_short():
    places = PLACE.findall(README)
    assert len(places) > 9
    assert [place for place in places if not defines(*place)] == []
    walk = README.partition("## From Image to PointCloud2")[2].partition("\n\nEvery decision")[0]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", walk, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) <= 9


def test_the_readme_parameters_are_those_of_the_code():
    known = {p.name: p.default for p in (*node_parameters(NodeConfig()), *parameters(Config()))}
    rows = rows_of("parameter")
    assert len(rows) > 5
    for name, default, _ in rows:
        value = known[name.strip("`")]
        written = default.strip("`")
        shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
        assert written == str(shown), name


def test_the_readme_topics_are_those_of_the_code():
    pytest.importorskip("rclpy", reason="rclpy is not installed")
    from spark3r_ros.ros import interface

    kinds = {i.topic: set(i.kinds) for i in interface.INPUTS} | {o.topic: {o.kind} for o in interface.OUTPUTS}
    names = {t: {f"{k.__module__.partition('.')[0]}/{k.__name__}" for k in found} for t, found in kinds.items()}
    for topics, types, _ in rows_of("topic"):
        for topic in re.findall(r"`([^`]+)`", topics):
            assert names[topic] == set(types.split(", ")), topic
    mentioned = set(re.findall(r"`(~?/?[\w/]+)`", README.partition("## From Image")[0]))
    assert {o.topic for o in interface.OUTPUTS} | {s.name for s in interface.SERVICES} <= mentioned


def test_every_page_is_listed():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page.name for page in PAGES if page.parent.name == "docs" and page.name != "index.md"]
    assert [page for page in pages if f"]({page})" not in index] == []
    assert [page for page in pages if f"](docs/{page})" not in README] == []


def test_the_readme_begins_with_the_two_commands_and_a_picture():
    first_screen = "\n".join(README.splitlines()[:25])
    assert "\nmake demo " in first_screen
    assert "\nmake test " in first_screen
    [picture] = re.findall(r"!\[[^\]]+\]\((.+?)\)", first_screen)
    assert (ROOT / picture).stat().st_size < 300_000
    assert len(README.splitlines()) < 180


def test_no_path_of_one_machine_and_no_registry_is_committed():
    """Plain `pip install` must work everywhere, and nothing may depend on where this was written."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    unwanted = re.compile(
        r"(?<![\w.])/(?:home|root|work)/\w|--(?:extra-)?index-url|files\.pythonhosted|pypi\.org/simple"
    )
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if (
            name
            and path.suffix in (".py", ".md", ".txt", ".toml", ".cfg", ".yaml", ".xml", ".sh", "")
            and path.is_file()
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{name}: {match.group()}" for match in unwanted.finditer(text) if path != Path(__file__)]
    assert not found
