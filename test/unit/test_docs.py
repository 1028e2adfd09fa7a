"""What the documents say is what the code does."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts import parameter_docs

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
