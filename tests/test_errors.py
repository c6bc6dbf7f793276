"""What messages take from the errors of libraries."""

import errno
import os

import pytest
import transformers as hf

from flare_exp.errors import UserError, first_line, out_of_room
from flare_exp.models import backbones


@pytest.mark.parametrize(
    ("said", "line"), [("one\ntwo", "one"), ("", "ValueError"), ("\ntwo", "ValueError")]
)
def test_an_error_has_a_first_line_whatever_it_says(said, line):
    assert first_line(ValueError(said)) == line


def test_a_library_that_says_nothing_is_no_traceback(monkeypatch, tmp_path):
    def silent(*_, **__):
        raise ValueError

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", silent)
    with pytest.raises(UserError, match="its tokenizer could not be read: ValueError"):
        backbones.load_tokenizer(str(tmp_path))


def fail_to_close():
    try:
        raise OSError(errno.ENOSPC, "write")
    except OSError:
        raise RuntimeError("the file was not closed")  # noqa: B904 (as libraries do)


def test_a_full_disk_is_found_behind_the_error_that_it_led_to():
    with pytest.raises(RuntimeError) as failure:
        fail_to_close()
    assert out_of_room(failure.value) == os.strerror(errno.ENOSPC)
    assert out_of_room(RuntimeError("the file was not closed")) is None
