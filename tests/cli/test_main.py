"""The command as a whole: what it loads, how it fails."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from typer.main import get_command

from kvant import __version__
from kvant.cli.main import app
from kvant.errors import RequestError


def run(*arguments: str, script: str = "from kvant.cli.main import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)


def parameters() -> list[tuple[str, object]]:
    """Every parameter of every verb."""
    root = get_command(app)
    verbs = {name: root.get_command(None, name) for name in root.list_commands(None)}
    return [(name, parameter) for name, verb in verbs.items() for parameter in verb.params]


def test_help_needs_neither_torch_nor_the_server():
    script = (
        "import sys; from kvant.cli.main import app; app(standalone_mode=False);"
        "print('loaded', *sorted({'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["chat", "--help"], ["serve", "--help"], ["models", "--help"]):
        done = run(*arguments, script=script)
        assert done.stdout.endswith("loaded\n"), done.stdout + done.stderr
        assert "Usage: kvant" in done.stdout or "Usage: -c" in done.stdout


def test_the_help_lists_the_verbs_and_keeps_the_lines_of_the_examples(kvant):
    shown = kvant("--help").stdout
    for verb in ("chat", "serve", "models", "env"):
        assert f"\n  {verb} " in shown
    assert "\n  kvant chat smollm2                     talk to it\n" in shown


def test_the_version(kvant):
    assert kvant("--version").stdout == f"kvant {__version__}\n"


@pytest.mark.parametrize(("verb", "parameter"), parameters(), ids=lambda value: getattr(value, "name", value))
def test_every_flag_says_what_it_does_and_has_a_twin(verb, parameter):
    if parameter.name in ("help", "as_json", "query"):
        return
    assert len(parameter.help) > 15
    twin = parameter.envvar[0] if isinstance(parameter.envvar, list) else parameter.envvar
    assert twin.startswith("KVANT_")


def test_an_error_is_one_line_and_debug_shows_where_it_came_from(kvant, pipes):
    result = kvant("chat", "-q", " ")
    assert result.exit_code == 1
    assert result.stderr == "error: the question is empty; put text after -q, or pipe it in with -q -\n"
    for flags, variables in ((["--debug"], {}), ([], {"KVANT_DEBUG": "1"})):
        result = kvant(*flags, "chat", "-q", " ", env=variables)
        assert isinstance(result.exception, RequestError)


def test_an_unknown_model_and_an_unknown_verb():
    done = run("chat", "/nowhere/at/all", "-q", "hi")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert run("dance").returncode == 2


def test_the_help_names_the_kv_formats(kvant):
    from kvant.formats.kv import KV_FORMATS

    shown = " ".join(kvant("chat", "--help").stdout.split())
    told = shown.partition("How the KV cache is stored: ")[2].partition(".")[0]
    assert set(KV_FORMATS) <= set(re.findall(r"\w+", told))


def test_the_help_tells_the_pipelines_own_limit(kvant):
    from kvant.pipelines import DEFAULT_MAX_TOKENS

    assert f"Default: {DEFAULT_MAX_TOKENS}." in " ".join(kvant("chat", "--help").stdout.split())
