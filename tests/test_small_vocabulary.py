"""A vocabulary with the words of some prompts alone: the same pieces, the same embeddings, refusals and warnings."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, T5TokenizerFast, UMT5Config, UMT5EncoderModel

import train_distillation
from tests.conftest import ROOT, run_script
from tests.test_small_parts import BOTH, FEW, StopAfter, copy_run, make_parts_of
from train_distillation import WanLiteStudent
from wanlite.data import text_encoder
from wanlite.data.text_encoder import encode_prompts, load_text_encoder, load_tokenizer
from wanlite.parts.folder import Student, make_folder
from wanlite.parts.vocabulary import choose_vocabulary, list_pieces
from wanlite.planning.defaults import choose_prompts
from wanlite.planning.resolve import complete as complete_run
from wanlite.planning.settings import make_parser
from wanlite.runtime.signals import Stopped
from wanlite.small import Settings
from wanlite.world import emoji, shapes

CAPTIONS = emoji.captions(0, 200)
UNKNOWN = "<unk>"
FOREIGN = "крот на поле и 猫"


@pytest.fixture(scope="module")
def unigram():
    """A tokenizer of UMT5's class, with pieces of captions and of a Russian sentence."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator([*CAPTIONS, *[f"{FOREIGN} qwertyuiopasdfghjklzxcvbnm"] * 20], trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    return T5TokenizerFast(vocab=[(piece, score) for piece, score in pieces], extra_ids=5)


@pytest.fixture(params=["unigram", "words"])
def large(request, unigram):
    """A tokenizer and an encoder that has new weights."""
    tokenizer = unigram if request.param == "unigram" else load_tokenizer(ROOT / "emoji_teacher/tokenizer")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, UMT5EncoderModel(config).eval().requires_grad_(False)


def test_kept_words_have_the_same_pieces_and_hidden_states(large, tmp_path):
    tokenizer, encoder = large
    vocabulary = choose_vocabulary(tokenizer, CAPTIONS, CAPTIONS[:50])
    small = vocabulary.cut(encoder)
    assert len(vocabulary.kept) == small.config.vocab_size < encoder.config.vocab_size
    vocabulary.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    own, expected = (encode_prompts(*each, CAPTIONS) for each in ((loaded, small), large))
    assert all(torch.equal(*pair) for pair in zip(own, expected, strict=True))


def test_scripts_that_remain_are_listed(unigram):
    scripts = choose_vocabulary(unigram, CAPTIONS, CAPTIONS).scripts
    assert scripts["Cyrillic"][0] == 0 < scripts["Cyrillic"][1]
    text = choose_vocabulary(unigram, CAPTIONS, CAPTIONS).describe()
    assert "Latin" in text and "Cyrillic" not in text


def test_a_vocabulary_without_words_of_the_prompts_is_refused(large):
    word = next(word for word in CAPTIONS[0].split() if not any(word in each for each in CAPTIONS[1:20]))
    with pytest.raises(ValueError, match=f"lacks words of 1 of the student's 20 prompts: .*{word}"):
        choose_vocabulary(large[0], CAPTIONS[1:20], CAPTIONS[:20])


def test_an_unknown_word_is_encoded_with_a_warning(large, monkeypatch):
    tokenizer, encoder = large
    warnings = []
    monkeypatch.setattr(text_encoder, "LOGGER", SimpleNamespace(warning=warnings.append))
    vocabulary = choose_vocabulary(tokenizer, CAPTIONS, CAPTIONS)
    (states,) = encode_prompts(vocabulary.tokenizer, vocabulary.cut(encoder), [f"{CAPTIONS[0]} крот"])
    assert states.isfinite().all()
    assert len(warnings) == 1 and "the small vocabulary lacks крот, and" in warnings[0]
    encode_prompts(tokenizer, encoder, ["крот"])
    assert len(warnings) == 1


def test_a_tokenizer_of_merges_is_refused():
    with pytest.raises(ValueError, match="the tokenizer is a BPE, expected Unigram or WordLevel"):
        list_pieces({"type": "BPE", "vocab": {}})


def test_a_folder_with_few_words_draws_as_the_one_with_all(finished_run, tmp_path):
    prompts = shapes.captions(0, 8)
    few = {flag.removeprefix("--"): int(value) for flag, value in zip(FEW[::2], FEW[1::2])}
    settings = Settings(decoder="large", **few)
    encoded = []
    for name, vocabulary in (("all", []), ("few", prompts)):
        student = Student(finished_run[0], WanLiteStudent, "cpu", prompts, prompts[:4], vocabulary)
        make_folder(tmp_path / name, student, settings)
        tokenizer, encoder = load_text_encoder(tmp_path / name)
        encoded.append(encode_prompts(tokenizer, encoder, prompts))
    assert all(torch.equal(*pair) for pair in zip(*encoded, strict=True))
    figures = json.loads((tmp_path / "few/run.json").read_text())["parts"]["figures"]
    assert figures["vocabulary"]["pieces"] == len(tokenizer) < len(load_tokenizer(tmp_path / "all/tokenizer"))


def test_a_vocabulary_file_is_checked_before_the_training(finished_run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red ring")
    arguments = ("-m", "wanlite.small", "--model", finished_run[0], "--output_dir", tmp_path / "s", *FEW)
    process = run_script(*arguments, "--vocabulary", path)
    assert process.returncode == 2 and "the vocabulary lacks words of" in process.stderr
    assert "projected" not in process.stdout
    process = run_script(*arguments, "--vocabulary", tmp_path / "none.txt")
    assert process.returncode == 2 and "no such file" in process.stderr


# ---- as the last phases of a run ---------------------------------------------------------------------------


def read_training(*arguments):
    """Return the settings of a training, not completed."""
    parser = make_parser(train_distillation.Settings, "")
    return train_distillation.Settings(**vars(parser.parse_args([*map(str, arguments)])))


@pytest.fixture
def own_words(tmp_path):
    """A file of the prompts of a short run."""
    settings = complete_run(read_training("--num_trajectories", 64, "--num_held_out", 16))
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([prompt for prompts in choose_prompts(settings) for prompt in prompts]))
    return path


def plan_with(path, folder, capsys):
    """Return the exit code and the printed lines of a dry run with a vocabulary."""
    few = ("--num_trajectories", "64", "--num_held_out", "16")
    arguments = ["--output_dir", str(folder), *BOTH, *few, "--vocabulary", str(path), "--dry_run"]
    code = train_distillation.plan(complete_run(read_training(*arguments)), arguments)
    return code, " ".join(capsys.readouterr().out.split())


def test_the_plan_of_a_training_has_the_pieces_that_stay(own_words, tmp_path, capsys):
    code, printed = plan_with(own_words, tmp_path / "run", capsys)
    assert code == 0 and "vocabulary: " in printed and " pieces: Latin" in printed


def test_the_plan_lists_the_words_that_a_vocabulary_lacks(own_words, tmp_path, capsys):
    own_words.write_text("a red ring")
    with pytest.raises(ValueError, match="the vocabulary lacks words of .* prompts: .*small"):
        plan_with(own_words, tmp_path / "run", capsys)


def test_a_training_refuses_a_vocabulary_without_use_or_without_a_file(tmp_path):
    for arguments, error, expected in (
        (["--vocabulary", "prompts.txt"], ValueError, "which needs --text_encoder small"),
        ([*BOTH, "--vocabulary", tmp_path / "none.txt"], OSError, "none.txt: no such file"),
    ):
        with pytest.raises(error, match=expected):
            complete_run(read_training("--output_dir", tmp_path, *arguments))


def test_small_parts_of_a_run_have_its_vocabulary_and_no_other(finished_run, own_words, tmp_path):
    folder = tmp_path / "run"
    copy_run(finished_run, folder)
    own = {"vocabulary": str(own_words)}
    with pytest.raises(Stopped):
        make_parts_of(folder, StopAfter(5), **own)
    prompts = own_words.read_text()
    own_words.write_text(f"{prompts}\na red ring")
    with pytest.raises(OSError, match="holds an unfinished training under other settings"):
        make_parts_of(folder, **own)
    own_words.write_text(prompts)
    make_parts_of(folder, **own)
    made = json.loads((folder / "run.json").read_text())["small"]
    assert made["figures"]["vocabulary"]["pieces"] == len(load_tokenizer(folder / "small/tokenizer"))
    assert made["options"]["vocabulary"]
    with pytest.raises(ValueError, match="holds small parts of other settings"):
        make_parts_of(folder)
