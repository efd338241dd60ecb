"""The documentation: what it names exists, no table appears twice, and its English is plain."""

import ast
import builtins
import re
import textwrap
from collections import Counter
from contextlib import suppress

import pytest

from tests.conftest import ROOT
from wanlite.world import shapes

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCRIPTS = [ROOT / "train_distillation.py", ROOT / "run_inference.py"]
COMMANDS = [*SCRIPTS, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py")]
CODE = (  # files whose docstrings and messages are held to the same English, as "wanlite/flow.py"; add yours
    *(
        str(path.relative_to(ROOT))
        for folder in ("files", "runtime", "teacher")
        for path in sorted((ROOT / "wanlite" / folder).glob("*.py"))
    ),
    *(
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "tools")
        for path in sorted((ROOT / folder).glob("*.py"))
    ),
    *(f"wanlite/{name}.py" for name in ("flow", "network", "schedule")),
    *(
        str(path.relative_to(ROOT))
        for folder in ("data", "serving", "student", "training", "world")
        for path in sorted((ROOT / "wanlite" / folder).rglob("*.py"))
        if path.name not in ("grammar.py", "prompts.py")
    ),
    "wanlite/phases.py",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "wanlite" / "planning").glob("*.py"))),
    "run_inference.py",
    "train_distillation.py",
)
OTHER_FLAGS = {  # of argparse, accelerate launch, TensorBoard, the Hugging Face command line
    *(
        "--all",  # of pytest
        "--help",
        "--help_all",
        "--config_file",
        "--main_process_ip",
        "--machine_rank",
        "--num_processes",
        "--logdir",
        "--local-dir",
    )
}
FOLDERS = ("wanlite", "tests", "benchmarks", "tools", "docs", "configs", "tiny_teacher", "emoji_atlas")
PATH = re.compile(
    rf"(?<![\w./-])((?:{'|'.join(FOLDERS)}|\.ci|\.github)/[\w./-]*\w|"
    r"\w+\.(?:py|md|toml|cff)|requirements[\w-]*\.txt)(?![\w-])"
)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
CODE_BLOCK = re.compile(r"(?:^ {4}.*\n?)+", re.M)  # without a blank line
PROMPT = re.compile(  # a quoted text after --prompt, or one that begins as a caption
    r"""(?:(?<=--prompt )|(?<=prompt=)|(?<=[(\[,= ])(?="an? ))"([^"]*)\""""
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PROGRAM = (
    r"\b(dry.run|commands?|scripts?|programs?|runs?|files?|folders?|headers?|configs?|flags?|messages?|manifests?|"
    r"benchmarks?|planner|README)"
)
FORBIDDEN = {  # why: what catches it
    "a program does not talk": r"\b(says|said|tells|told)\b|\b(can|will|must|would|to) (say|tell)\b",
    "a program does not ask or know": r"\b(asks?|knew)\b|\b(it|which|that) knows?\b|\b(is|are|was|be) asked\b",
    "a program does not rest or learn": rf"{PROGRAM} (knows?|rests?|learns?)\b",
    "networks are loaded and unloaded": r"\blets? go\b|\bat rest\b",
    "'is no X': write 'is not', or a verb": r"(?<!there )\b(is|are|was|were) no (?!longer\b)",
    "so many": r"\bso many\b",
    "others than": r"\bothers than\b",
    "goes on: write 'continues' or 'resumes'": r"\b(go|goes|going|went) on\b",
    "a save is atomic": r"\bwhole or not\b",
    "a clause in place of a subject": r"\b[Ww]hat (?:[\w`'-]+ ){1,8}(is|are|was|were) (said|told|named|refused|skipped|left)\b",
    "'as much as' in place of an amount": r"\bas (much|many) (go|goes|as the memory takes)\b",
    "inverted order": r"\b[Oo]f (it|them|these|those|a real \w+),? (it|they|the|a|an)\b",
}


def words_of(path):
    """Return the prose of a file as {line number: text}: a page's paragraphs, or the strings of code."""
    if path.suffix != ".py":
        return paragraphs(path.read_text(encoding="utf-8"))
    strings = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    return {
        node.lineno: " ".join(node.value.split())
        for node in strings
        if isinstance(node.value, str) and " " in node.value.strip()
    }


def paragraphs(text):
    """Return {number of its first line: paragraph}, each joined into one line."""
    found, start = {}, None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            start = None
        else:
            start = start or number
            found[start] = f"{found.get(start, '')} {line.strip()}".strip()
    return found


def defined_flags():
    """Return every flag of a script, a benchmark or a tool."""
    flags = set(OTHER_FLAGS)
    for path in [*COMMANDS, *(ROOT / "wanlite").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == "Settings":
                names = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]
                flags |= {f"--{name}" for name in names} | {f"--no-{name}" for name in names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                flags |= {node.value} if FLAG.fullmatch(node.value) and path in COMMANDS else set()
    return flags


def anchors(path):
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path):
    """Return the links of a page to files of this repository, as (target, anchor or '')."""
    found = [target.partition("#") for target in LINK.findall(path.read_text(encoding="utf-8"))]
    return [
        ((path.parent / name).resolve() if name else path, anchor)
        for name, _, anchor in found
        if not name.startswith("http")
    ]


def python_of(path):
    """Return the indented code of a page that is Python, one tree for each block without a blank line."""
    trees = []
    for block in CODE_BLOCK.findall(path.read_text(encoding="utf-8")):
        with suppress(SyntaxError):  # commands, trees of folders, output
            trees.append(ast.parse(textwrap.dedent(block)))
    return [
        tree
        for tree in trees
        if any(isinstance(node, (ast.Call, ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
    ]


def tables(path):
    """Return the tables of a page, each as a list of rows, each row a tuple of cells."""
    blocks = re.findall(r"(?:^\|.*\n?)+", path.read_text(encoding="utf-8"), re.M)
    rows = ([re.split(r"\s*\|\s*", line.strip("| ")) for line in block.splitlines()] for block in blocks)
    return [[tuple(row) for row in block if set("".join(row)) - {"-"}] for block in rows]


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_can_be_reached_from_the_readme():
    reached, coming = set(), [README]
    while coming:
        page = coming.pop()
        reached.add(page)
        coming += [target for target, _ in links(page) if target.suffix == ".md" and target not in reached]
    assert not set(PAGES) - reached


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target.name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_mentions_exists(page):
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_mentions_exists(page):
    assert not set(FLAG.findall(page.read_text(encoding="utf-8"))) - defined_flags()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_mentions_exists(page):
    source = "\n".join(path.read_text() for path in [*ROOT.glob("test_*.py"), *(ROOT / "tests").glob("*.py")])
    names = re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in names if f"def {name}(" not in source]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page):
    """Every name is imported or assigned in the page, above its use."""
    known = set(dir(builtins))
    for code in python_of(page):
        nodes = [*ast.walk(code)]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {alias.asname or alias.name for node in nodes for alias in getattr(node, "names", ())}
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        assert not {node.id for node in names} - known, ast.unparse(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_prompt_of_an_example_is_a_complete_caption(page):
    """The student of the quickstart draws nothing for half a caption."""
    prompts = PROMPT.findall("".join(CODE_BLOCK.findall(page.read_text(encoding="utf-8"))))
    assert not [prompt for prompt in prompts if shapes.read_caption(prompt) is None]


def test_no_table_and_no_row_of_figures_appears_twice():
    found = [table for page in PAGES for table in tables(page)]
    figures = Counter(row for table in found for row in table[1:] if sum(map(has_figure, row)) >= 3)
    assert not [row for row, count in figures.items() if count > 1]
    assert not [table for table in found if found.count(table) > 1]


def has_figure(cell):
    return any(character.isdigit() for character in cell)


def test_the_readme_runs_the_tests_as_the_ci_does():
    requirements, arguments = re.search(
        r"^ {4}pip install -r (\S+) && pytest(.*)$", README.read_text(encoding="utf-8"), re.M
    ).groups()
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    assert not arguments and any(step.startswith("pip ") and f"-r {requirements}" in step for step in steps)
    assert steps[-1].split()[0] == "pytest"


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / name for name in CODE)], ids=lambda path: path.name)
def test_the_english_is_plain(path):
    for number, text in words_of(path).items():
        for why, pattern in FORBIDDEN.items():
            match = re.search(pattern, text)
            assert not match, f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: {why}"


@pytest.mark.parametrize(
    "text",
    [
        "What does not fit is said before anything is computed, with what would.",
        "A large teacher is asked in bf16.",
        "as many go at once as the memory takes",
        "A save is whole or not there.",
        "of them, the first so many that can be used",
        "step 200 is no candidate to be saved",
        "the same command goes on from the newest checkpoint",
        "held against the flags: a config that says others than these",
        "of a real Wan it has 11 GB",
        "the dry run tells what a run will need",
        "a header knows its length",
    ],
)
def test_a_forbidden_phrase_is_found(text):
    assert any(re.search(pattern, text) for pattern in FORBIDDEN.values())


@pytest.mark.parametrize(
    "text",
    [
        "If something does not fit, the run stops before computing anything and names the setting to change.",
        "Saves are atomic.",
        "there is no folder of this name",
        "a student learns the velocity",
        "step 200: rejected, colour drift 1.03 (limit 0.3)",
        "What a run saves",
    ],
)
def test_plain_english_is_not_found(text):
    assert not any(re.search(pattern, text) for pattern in FORBIDDEN.values())
