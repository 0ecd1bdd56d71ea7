"""The tokenizers of the decoder's program: their marks, and llama2.c's merges."""

import json
import struct

import pytest

tokenizers = pytest.importorskip("tokenizers")
tokens = pytest.importorskip("finetuning.tokens")  # of the examples beside the tests

WORDS = {"[UNK]": 0, "<bos>": 1, "<eos>": 2, "a": 3, "<s>": 4}


def hub(folder, *, marked=False, **files):
    """A tokenizer of words, with what the files beside it state."""
    held = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "[UNK]"))
    held.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if marked:
        held.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    held.save(str(folder / "tokenizer.json"))
    for name, stated in files.items():
        (folder / f"{name}.json").write_text(json.dumps(stated))
    return tokens.tokenizer_of(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("marked", "files", "begin", "end"),
    [
        (True, {"tokenizer_config": {"eos_token": "<eos>"}}, [1], [2]),
        (
            False,
            {"tokenizer_config": {"bos_token": {"content": "<bos>"}, "eos_token": "a"}},
            [1],
            [3],
        ),
        # Qwen: a number in the config that is put nowhere.
        (
            False,
            {
                "tokenizer_config": {"bos_token": None, "eos_token": "<eos>"},
                "config": {"bos_token_id": 3, "eos_token_id": 3},
            },
            [],
            [2],
        ),
        (
            True,
            {
                "generation_config": {"eos_token_id": [2, 3]},
                "config": {"eos_token_id": 3},
            },
            [1],
            [2],
        ),
        (False, {"config": {"eos_token_id": 2}}, [], [2]),
        (False, {}, [], []),
    ],
)
def test_marks_are_those_of_the_folder(tmp_path, marked, files, begin, end):
    held, *marks = hub(tmp_path, marked=marked, **files)
    assert marks == [begin, end]
    assert held.encode("a a") == [3, 3]


def test_a_mark_that_is_no_token(tmp_path):
    with pytest.raises(ValueError, match="no token '<end>', which tokenizer_config"):
        hub(tmp_path, tokenizer_config={"eos_token": "<end>"})


def merges(file, pieces):
    """llama2.c's file of pieces, each better than the one before it."""
    entries = [
        struct.pack("fi", number, len(piece)) + piece
        for number, piece in enumerate(pieces)
    ]
    file.write_bytes(struct.pack("i", 8) + b"".join(entries))
    return tokens.tokenizer_of(file)[0]


BYTES = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{byte:02X}>".encode() for byte in range(256)]


def test_spaces_in_a_row_are_one_piece(tmp_path):
    """As in Llama 2's, where the first merge is that of two spaces."""
    pieces = [*BYTES, b" ", b"a", b"b", b" b", b"  ", b" a"]
    held = merges(tmp_path / "t.bin", pieces)
    said = [b"".join(pieces[i] for i in held.encode(text)) for text in ("a   b", "")]
    assert said == [b" a   b", b""]
    assert [pieces[i] for i in held.encode("a   b")] == [b" a", b"  ", b" b"]


@pytest.mark.parametrize(
    ("pieces", "cut", "match"),
    [
        ([*BYTES, b"a b"], 0, "goes on behind a space"),
        ([*BYTES, b"a "], 0, "goes on behind a space"),
        (BYTES, 3, "is cut short"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, pieces, cut, match):
    file = tmp_path / "t.bin"
    with pytest.raises(ValueError, match=match):  # noqa: PT012
        merges(file, pieces)
        file.write_bytes(file.read_bytes()[:-cut])
        tokens.tokenizer_of(file)


def test_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs")
    with pytest.raises(ValueError, match=r"tokenizer\.json describes no tokenizer"):
        tokens.tokenizer_of(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"config": {"eos_token_id": -1}}, r"config\.json: eos_token_id -1 is no token"),
        ({"config": {"eos_token_id": 99}}, "eos_token_id 99 is no token"),
        ({"generation_config": {"eos_token_id": "</s>"}}, "eos_token_id '</s>' is no"),
        ({"config": {"eos_token_id": 2**40}}, "is no token of tokenizer"),
        (
            {"tokenizer_config": {"eos_token": 5}},
            "has no token 5, which tokenizer_config",
        ),
    ],
)
def test_marks_that_are_none(tmp_path, files, match):
    with pytest.raises(ValueError, match=match):
        hub(tmp_path, **files)
