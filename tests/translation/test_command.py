"""Translation by another program: hostile texts, hostile programs, what is kept."""

import json
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from flare_exp.artifacts import ArtifactStore
from flare_exp.errors import UserError
from flare_exp.tasks import Answer, Example, ToyQA, ToySentiment
from flare_exp.translation.command import CommandEngine, code_of_language, command_problems
from flare_exp.translation.machine import MachineTranslator
from flare_exp.utils import signals

# Writes every line in brackets. A line that begins with "do" says what to do instead, unless CALM
# is set. LOG gets the input of every call, PID the process.
PROGRAM = """
import os, sys, time
data = sys.stdin.buffer.read()
if "LOG" in os.environ:
    with open(os.environ["LOG"], "ab") as log:
        log.write(b"call\\n" + data)
for line in data.decode().split("\\n")[:-1]:
    word = "" if "CALM" in os.environ else line.removeprefix("do ")
    if word == "die":
        print("loading\\nno memory", file=sys.stderr)
        sys.exit(3)
    if word == "few":
        sys.exit(0)
    if word == "latin":
        sys.stdout.buffer.write("\\u00e9".encode("latin-1"))
    if word == "hang":
        with open(os.environ["PID"], "w") as file:
            file.write(str(os.getpid()))
        print("thinking", file=sys.stderr, flush=True)
        time.sleep(60)
    while word == "flood":
        sys.stdout.write("more and more\\n" * 999)
    sys.stdout.buffer.write((f"<{line}>" if line else "").encode() + b"\\n")
    sys.stdout.flush()
"""
# text -> its translation
HOSTILE = {
    "": "",
    " \n\t ": " \n\t ",
    "one\ntwo\r\n\r\nthree\n": "<one>\n<two>\r\n\r\n<three>\n",
    "a\tb\x00c\x0bd\x0ce\x1bf\x85g\u2028h\u2029i": (
        "<a>\t<b>\x00<c>\x0b<d>\x0c<e>\x1b<f>\x85<g>\u2028<h>\u2029<i>"
    ),
    "  ^a/b$ <i>{x}</i> [y] @ # ~ \\ * %s  ": "  <^a/b$ <i>{x}</i> [y] @ # ~ \\ * %s>  ",
    "5,000 letters" + "x" * 4987: "<5,000 letters" + "x" * 4987 + ">",
    "\U0001f600 e\u0301 \U0001f469\u200d\U0001f467": (
        "<\U0001f600 e\u0301 \U0001f469\u200d\U0001f467>"
    ),
    "\u4f60\u597d \u05e9\u05dc\u05d5\u05dd \u0645\u0631": (
        "<\u4f60\u597d \u05e9\u05dc\u05d5\u05dd \u0645\u0631>"
    ),
    "\u3000wide\u00a0space\u3000": "\u3000<wide\u00a0space>\u3000",
    "half \ud83d a pair": "<half> \ud83d <a pair>",
    "two": "<two>",
}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write PROGRAM and return the command that runs it."""
    (tmp_path / "program.py").write_text(PROGRAM)
    for name in ("LOG", "PID"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return f"{sys.executable} -S {tmp_path / 'program.py'} {{from}} {{to}}"


def calls(tmp_path) -> list[list[str]]:
    """The lines of each call."""
    return [
        [line for line in call.split("\n") if line]
        for call in (tmp_path / "LOG").read_bytes().decode().split("call\n")[1:]
    ]


def test_one_text_is_one_translation_whatever_is_in_it(program, tmp_path):
    told = []
    texts = [*HOSTILE, "two"]
    made = CommandEngine(program).translate(texts, "eng", "spa", progress=told.append)
    assert [m.text for m in made] == [*HOSTILE.values(), "<two>"]
    assert sum(told) == len(texts)
    (lines,) = calls(tmp_path)
    assert lines.count("two") == 1
    assert all(line.isprintable() or "\u3000" in line for line in lines if line.isascii())
    for text, translation in list(HOSTILE.items())[2:5]:
        assert CommandEngine(program).translate([text], "eng", "spa")[0].text == translation


def test_nothing_is_started_for_blank_texts(program, tmp_path):
    assert [m.text for m in CommandEngine(program).translate(["", "\n"], "a", "b")] == ["", "\n"]
    assert not (tmp_path / "LOG").exists()


MESSAGES = {
    "die": r"ended with exit status 3; its last words: loading / no memory",
    "few": r"wrote 0 lines .* for 2 lines with an empty line after each; it said nothing",
    "latin": r"wrote bytes that are not UTF-8 \(0xe9 in line 1\)",
    "hang": r"had not ended after 1 s and was killed; its last words: thinking",
    "flood": r"wrote more than 1,04\d,\d{3} bytes and was killed; its last words: more and more /",
}


@pytest.mark.parametrize("word", MESSAGES)
def test_a_hostile_program_is_one_message_and_nothing_is_lost(program, tmp_path, monkeypatch, word):
    task = ToySentiment()
    examples = [
        Example(f"toy_sentiment/en/train/{i}", str(i), (text,), 0)
        for i, text in enumerate(["a", "b", f"do {word}", "c", "d"])
    ]

    def translator():
        engine = CommandEngine(program, timeout=1 if word == "hang" else 60)
        return MachineTranslator(task, engine, ArtifactStore(tmp_path / "cache"), shard=2)

    with pytest.raises(UserError, match=MESSAGES[word]) as error:
        translator().translate(examples, "far")
    said = str(error.value)
    assert said.startswith(f"mt.command={program}, from eng to far: the program ")
    assert said.endswith("(finished shards are kept)")
    assert "\n" not in said
    if word == "hang":
        assert_gone(tmp_path)
    monkeypatch.setenv("CALM", "1")
    made = translator().translate(examples, "far")
    assert [m.texts[0] for m in made] == ["<a>", "<b>", f"<do {word}>", "<c>", "<d>"]
    assert calls(tmp_path) == [["a", "b"], [f"do {word}", "c"], [f"do {word}", "c"], ["d"]]


def assert_gone(tmp_path):
    number = int((tmp_path / "PID").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.parametrize("by", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_leaves_no_process_behind(program, tmp_path, monkeypatch, by):
    started = threading.Event()
    # a shell starts what it puts in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop():
        while not (tmp_path / "PID").exists() or not (tmp_path / "PID").read_text():
            started.wait(0.02)
        if by == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        else:  # it would be pending
            monkeypatch.setattr(signals, "pending_signal", lambda: signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt if by == "SIGINT" else signals.StopRequested):
            CommandEngine(program, timeout=20).translate(["do hang"], "a", "b")
    finally:
        signal.signal(signal.SIGINT, before)
    assert_gone(tmp_path)


def test_a_program_that_reads_nothing_blocks_nothing():
    texts = [f"{i} " + "x" * 999 for i in range(300)]  # more than a pipe holds
    engine = CommandEngine("sh -c 'exit 0' sh {from} {to}")
    with pytest.raises(UserError, match=r"wrote 0 lines \(0 of them not empty\) for 300 lines"):
        engine.translate(texts, "a", "b")


# joins the lines of a paragraph, and writes as many
JOINING = "import sys; t = sys.stdin.read(); print('\\n\\n'.join(\
'\\n'.join(reversed(p.split('\\n'))) for p in t.strip().split('\\n\\n')))"


def test_empty_lines_keep_texts_apart():
    command = f'{sys.executable} -S -c "{JOINING}" {{from}} {{to}}'
    texts = ["one", "two", "three"]

    def made(blank_lines):
        engine = CommandEngine(command, blank_lines=blank_lines)
        return [m.text for m in engine.translate(texts, "a", "b")]

    assert made(blank_lines=True) == texts
    assert made(blank_lines=False) == ["three", "two", "one"], "which is why they are there"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("grep .", "if it leaves out empty lines, set mt.blank_lines=false"),
        ("sed s/^$/x/", "for 3 lines with an empty line after each, and empty lines are not where"),
        ("sed p", r"wrote 12 lines \(6 of them not empty\) for 3 lines"),
        (
            "kill -SEGV $$",
            r"the program was ended by SIGSEGV; it said nothing \(finished shards are kept\)",
        ),
    ],
)
def test_shifted_lines_are_noticed(script, problem):
    engine = CommandEngine(f"sh -c '{script}' sh {{from}} {{to}}")
    with pytest.raises(UserError, match=problem):
        engine.translate(["a", "b", "c"], "x", "y")


@pytest.mark.parametrize("blank_lines", [True, False])
def test_other_ends_of_lines_are_fine(blank_lines):
    """CR LF, and no end after the last line."""
    script = r"sed -e '\''s/$/\r/'\'' | head -c -2"
    engine = CommandEngine(f"sh -c '{script}' sh {{from}} {{to}}", blank_lines=blank_lines)
    made = engine.translate(["a b", "c"], "x", "y")
    assert [m.text for m in made] == ["a b", "c"]


def test_arguments_are_filled_in_without_a_shell():
    program = "import sys; [print(sys.argv[1:] if line.strip() else '') for line in sys.stdin]"
    engine = CommandEngine(f'{sys.executable} -S -c "{program}" --pair={{from}}-{{to}} "$HOME; ls"')
    (made,) = engine.translate(["x"], "a{to}", "b")
    assert made.text == str(["--pair=a{to}-b", "$HOME; ls"])


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", ["quotes", "brackets", "tags"])
def test_answers_are_carried_through(program, tmp_path, marker):
    context = 'It rained.\nThe "red" [house] <b>of</b> Ann\'s\tstands\nin Rome.'
    task = ToyQA()
    start = context.index("Rome")
    example = Example(
        "toy_qa/en/train/0", "0", (context, "Where?"), answers=(Answer("Rome", start),)
    )
    assert task.context == 0
    translator = MachineTranslator(
        task, CommandEngine(program), ArtifactStore(tmp_path / "cache"), marker=marker
    )
    (made,) = translator.translate([example], "far")
    (answer,) = made.answers
    assert answer.text == "Rome"
    assert made.texts[0].startswith("Rome", answer.start)
    assert made.texts[0].endswith("\n<in Rome.>")
    assert made.texts[0].count("\n") == 2
    assert made.texts[0].count("\t") == 1


# --- languages and keys --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lang", "codes", "code"),
    [
        ("en", {}, "eng"),
        ("spa_Latn", {}, "spa"),
        ("ace", {}, "ace"),
        ("es", {"es": "es-419", "spa_Latn": "x"}, "es-419"),
        ("es", {"spa_Latn": "es_ES"}, "es_ES"),
        ("zh", {"zh": "zh-CN"}, "zh-CN"),
        ("bbc", {"bbc": "bbc"}, "bbc"),
    ],
)
def test_codes_of_languages(lang, codes, code):
    assert code_of_language(lang, codes) == code


@pytest.mark.parametrize(
    ("lang", "reason"),
    [
        ("zh", r"zh is not known \(it could be zho_Hans or zho_Hant\); give it, .*'\{zh: zho\}'"),
        ("bbc", r"bbc is not known \(FLORES-200 lacks it\)"),
    ],
)
def test_a_code_that_could_be_wrong_is_asked_for(lang, reason):
    with pytest.raises(UserError, match=f"^mt.codes: the command's code for the language {reason}"):
        code_of_language(lang, {})


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("apertium -u", r"\{from\} and \{to\} missing"),
        ("cat {from}", r"mt.command=cat \{from\}: \{to\} missing"),
        ("cat '{from} {to}", "no closing quotation"),
        ("no-such-program {from} {to}", "there is no program 'no-such-program' here"),
        ("/etc {from} {to}", "there is no program '/etc' here"),
    ],
)
def test_a_wrong_command_is_told_before_anything_runs(command, problem):
    (found,) = command_problems(command)
    assert found.startswith(f"mt.command={command}: ")
    with pytest.raises(UserError, match=problem):
        CommandEngine(command).check("eng", "spa")


def test_a_program_per_direction_is_looked_for():
    with pytest.raises(UserError, match="there is no program 'translate-eng-spa' here"):
        CommandEngine("translate-{from}-{to}").check("eng", "spa")


def test_what_decides_a_translation_is_in_its_identity(program, tmp_path):
    def identity(command=program, **options):
        return json.dumps(CommandEngine(command, **options).identity, sort_keys=True)

    before = identity()
    assert identity(timeout=5, codes={"en": "x"}) == before, "codes are in from and to"
    others = [identity(revision="2"), identity(blank_lines=False), identity(f"{program} -b 6")]
    with (tmp_path / "program.py").open("a") as file:
        file.write("# changed\n")
    assert len({before, identity(), *others}) == 5


def test_a_direction_is_tried_before_models_are_trained(program, tmp_path):
    task = ToySentiment()
    examples = [
        Example(f"toy_sentiment/en/train/{i}", str(i), (t,), 0) for i, t in enumerate("abc")
    ]
    store = ArtifactStore(tmp_path / "cache")
    for _ in range(2):
        MachineTranslator(task, CommandEngine(program), store).try_out(examples, "far")
    assert calls(tmp_path) == [["a"]], "once for all runs"
    refusing = CommandEngine("sh -c 'echo no such pair: $1-$2 >&2; exit 1' sh {from} {to}")
    with pytest.raises(UserError, match="exit status 1; its last words: no such pair: eng-far"):
        MachineTranslator(task, refusing, store).try_out(examples, "far")


# --- Apertium ------------------------------------------------------------------------------------

APERTIUM = Path("/usr/share/apertium/modes/eng-spa.mode")


@pytest.mark.skipif(
    not (shutil.which("apertium") and APERTIUM.is_file()), reason="apertium-eng-spa is not here"
)
def test_apertium_translates_texts_apart():
    """Its rules reorder words across line breaks: "house is red" ends as "grande es roja"."""
    engine = CommandEngine("apertium -u {from}-{to}")
    texts = ["The big", "house is red", "a [big] ^house$\twith <b>cats</b>\n{and} @dogs/", "New"]
    made = [m.text for m in engine.translate(texts, "eng", "spa")]
    assert made[:2] == ["El grande", "La casa es roja"]
    assert re.sub(r"\w+", "", made[2]) == re.sub(r"\w+", "", texts[2])
    alone = [m.text for text in texts[2:] for m in engine.translate([text], "eng", "spa")]
    assert made[2:] == alone


def test_a_file_counts_behind_a_program_whose_name_has_a_placeholder(tmp_path):
    (tmp_path / "model.bin").write_text("a")
    command = f"./run-{{from}} {tmp_path}/model.bin {{to}}"
    before = CommandEngine(command).identity
    (tmp_path / "model.bin").write_text("b")
    assert CommandEngine(command).identity != before
