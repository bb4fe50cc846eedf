"""Words that a command does not know are answered in one line."""

import pytest

from fedcmr.client.cli import main as client
from fedcmr.server.cli import main as server


@pytest.mark.parametrize(
    ("main", "words", "told"),
    [
        (client, ["chek", "cases"], "there is no command 'chek', did you mean 'check'?"),
        (client, ["approve"], "there is no command 'approve': it is one of prepare, "),
        (
            client,
            ["prepare", "a", "b", "--format", "DICOM"],
            "error: --format cannot be 'DICOM', did you mean 'dicom'?",
        ),
        (client, ["prepare", "a", "b"], "required: --format ('fedcmr-client prepare --help' explains)"),
        (client, ["init", "a", "--name", "x", "--vendor", "GE", "--nominal-patients", "0"], "whole number from 1"),
        (server, ["rum", "study"], "there is no command 'rum', did you mean 'run'?"),
        (server, ["run", "study", "--tets", "x"], "--tets"),
    ],
)
def test_bad_words_are_one_line_and_code_2(capsys, main, words, told):
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out
    assert printed.err.startswith("error: ") and told in printed.err and len(printed.err.splitlines()) == 1
