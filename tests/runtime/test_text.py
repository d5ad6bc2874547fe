import io

import pytest

from rst_jax.runtime.text import check_name, plain, show


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("ratio-0.1, 8/255 \N{PLUS-MINUS SIGN} é 猫", "ratio-0.1, 8/255 \N{PLUS-MINUS SIGN} é 猫"),
        ("suspect\x1b[2K\rtrustworthy", r"suspect\x1b[2K\rtrustworthy"),
        ("a\nverdict: trustworthy", r"a\nverdict: trustworthy"),
        ("\x9b2J\x7f\b\0", r"\x9b2J\x7f\x08\x00"),
        ("\u202eyhtrowtsurt\u2066\u200b\u2028\ud800", r"\u202eyhtrowtsurt\u2066\u200b\u2028\ud800"),
    ],
)
def test_nothing_but_letters_reaches_a_reader(text, seen):
    assert plain(text) == seen


@pytest.mark.parametrize(("encoding", "seen"), [("utf-8", "é\\x1b[0m\nb\n"), ("ascii", "\\xe9\\x1b[0m\nb\n")])
def test_lines_are_told_in_whatever_a_terminal_can_show(encoding, seen):
    file = io.TextIOWrapper(io.BytesIO(), encoding, newline="\n")
    show("é\x1b[0m\nb", file)
    assert file.buffer.getvalue().decode(encoding) == seen


@pytest.mark.parametrize("name", ["ratio-0.1", "dense", "my best (ticket)", "猫", "a" * 150, "lr=0.1+seed=2"])
def test_plain_words_name_files(name):
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../../x", "/etc/x", "a/b", "a\\b", "c:x", ".hidden", "-rf", "a ", "a.", "NUL", "con.txt", "a\0",
     "a\x1b[0m", "a\n", "\u202ea", "a" * 151, "猫" * 51, "\ud800", "a?", "*"],
)  # fmt: skip
def test_what_could_leave_its_folder_names_none(name):
    with pytest.raises(ValueError, match="a ticket's name must be a plain word"):
        check_name(name, "a ticket's name")
