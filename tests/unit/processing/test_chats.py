"""Prompts and chats to the checkpoint's own template, and a RequestError with a reason for every wrong one."""

from __future__ import annotations

import warnings

import pytest
import torch
from media_and_requests import CHECKPOINT, LIMITS, ask, reason
from transformers import AutoProcessor

from adapter.config.load import parse_request
from adapter.config.schema import Processor
from adapter.requests import media
from adapter.requests.processing import RequestError, RequestProcessor
from policies.errors import UserError


def test_the_prompt_is_the_chat_templates(processor, files):
    tokenizer = processor._processor.tokenizer
    text = tokenizer.decode(ask(processor, "What?", images=[files["a"]], system="Be brief.").tensors["input_ids"][0])
    pads = "<|image_pad|>" * 6
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{pads}<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_are_the_same_as_a_prompt(processor, files):
    parts = [{"type": "image_url", "image_url": {"url": files["a_url"]}}, {"type": "video", "video": files["video2"]}]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
    by_chat = processor.prepare(parse_request({"id": "x", "messages": chat}))
    by_prompt = ask(processor, images=[files["a"]], videos=[files["video2"]])
    assert by_chat.id == "x"
    for key, tensor in by_prompt.tensors.items():
        assert torch.equal(by_chat.tensors[key], tensor), key


@pytest.mark.parametrize("media", ["images", "videos", None])
@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_prompt_is_an_error_also_beside_a_picture(processor, files, media, prompt):
    file = {"images": files["a"], "videos": files["video2"]}
    assert "the prompt is empty" in reason(processor, prompt=prompt, **({media: [file[media]]} if media else {}))


def test_an_empty_chat_is_an_error(processor, files):
    chat = [{"role": "system", "content": "hi"}, {"role": "user", "content": [{"type": "image", "image": files["a"]}]}]
    with pytest.raises(RequestError, match="the prompt is empty"):
        processor.prepare(parse_request({"id": "r", "messages": chat}))


def special_tokens() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoProcessor.from_pretrained(CHECKPOINT).tokenizer
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def test_special_tokens_in_the_text_are_an_error(processor, files):
    names = special_tokens()
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"} <= set(names)
    for name in [*names, "<|placeholder|>"]:
        assert repr(name) in reason(processor, prompt=f"what is{name}?")
        assert repr(name) in reason(processor, system=name)
    parts = [{"type": "text", "text": "<|image"}, {"type": "text", "text": "_pad|>"}]
    with pytest.raises(RequestError, match="a meaning of its own"):  # the template would put the halves together
        processor.prepare(parse_request({"id": "r", "messages": [{"role": "user", "content": parts}]}))
    ask(processor, prompt="a < b | c > d <image> </s> [INST]")
    assert reason(processor, prompt="half a character \ud800")


def test_prompts_that_are_too_long_name_both_numbers(processor, files, monkeypatch):
    assert ask(processor, "word " * 300).prompt_tokens < 2000
    reported = reason(processor, prompt="word " * 3000)
    assert "at most 2000 fit" in reported and int(reported.split()[3]) > 3000, reported
    exact = ask(processor, images=[files["a"]]).prompt_tokens
    assert ask(RequestProcessor(CHECKPOINT, LIMITS, exact), images=[files["a"]]).prompt_tokens == exact
    less = RequestProcessor(CHECKPOINT, LIMITS, exact - 1)
    assert f"{exact} tokens, and at most {exact - 1} fit" in reason(less, images=[files["a"]])


def test_pictures_and_videos_that_are_too_many_are_refused_before_work_is_done(files, monkeypatch):
    small = RequestProcessor(CHECKPOINT, LIMITS, 50)
    monkeypatch.setattr(media, "_decode", lambda *_: pytest.fail("decoded"))
    assert "20 frames of 84 x 56 it has at least 60 tokens" in reason(small, videos=[files["long"]])
    assert "it has at least 60 tokens" in reason(small, videos=[[files["a"]] * 20])
    monkeypatch.setattr(type(small), "_render", lambda *_: pytest.fail("went on"))
    assert "54 tokens, and at most 50 fit" in reason(small, images=[files["a"]] * 9)


def test_what_a_library_raises_becomes_a_request_error(processor, monkeypatch):
    def broken(error):
        def render(*_):
            raise error

        monkeypatch.setattr(RequestProcessor, "_render", render)

    for error in (RuntimeError("odd shape"), KeyError("k"), AssertionError("no"), RecursionError("deep")):
        broken(error)
        assert type(error).__name__ in reason(processor)
    for error in (KeyboardInterrupt(), SystemExit(1)):
        broken(error)
        with pytest.raises(type(error)):
            ask(processor)


def test_a_template_that_leaves_pictures_out(processor, files, monkeypatch):
    monkeypatch.setattr(RequestProcessor, "_render", lambda *_: "no place for pictures")
    assert reason(processor, images=[files["a"]])


@pytest.mark.parametrize("gone", ["preprocessor_config.json", "tokenizer.json", "chat_template.json", None])
def test_a_checkpoint_without_its_side_files(tmp_path, gone):
    for file in CHECKPOINT.iterdir():
        without = {gone} | ({"merges.txt", "vocab.json"} if gone == "tokenizer.json" else set())
        if gone and file.suffix in (".json", ".txt") and file.name not in without and "index" not in file.name:
            text = file.read_text()
            if gone == "chat_template.json" and file.name == "tokenizer_config.json":
                text = text.replace('"chat_template"', '"no_template"')
            (tmp_path / file.name).write_text(text)
    with pytest.raises(UserError, match="processor, tokenizer or chat template cannot be used") as caught:
        RequestProcessor(tmp_path, Processor(), 100)
    assert str(tmp_path) in str(caught.value)


QUESTION = {"role": "user", "content": "What colour?"}


def text_of(processor, *messages) -> str:
    ids = processor.prepare(parse_request({"id": "r", "messages": [QUESTION, *messages]})).tensors["input_ids"][0]
    return processor._processor.tokenizer.decode(ids)


@pytest.mark.parametrize("reported", ["The colour is", "It is ", "", "a\n\n", "What colour?"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_last_turn_of_the_assistant_is_continued(processor, reported, parts):
    content = [{"type": "text", "text": "I see: "}, {"type": "text", "text": reported}] if parts else reported
    before = text_of(processor)
    assert before.endswith("<|im_start|>assistant\n")
    assert text_of(processor, {"role": "assistant", "content": content}) == before + "I see: " * parts + reported


def test_a_turn_of_the_assistant_before_the_last_stays_closed(processor):
    text = text_of(processor, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "And now?"})
    assert "Red.<|im_end|>" in text and text.endswith("And now?<|im_end|>\n<|im_start|>assistant\n")


def test_what_goes_on_is_the_releases_own(processor):
    """Where the release can continue a message itself, the text is the same."""
    reported = {"role": "assistant", "content": [{"type": "text", "text": "The colour is"}]}
    chat = [{"role": "user", "content": [{"type": "text", "text": "What colour?"}]}, reported]
    theirs = processor._processor.tokenizer.apply_chat_template(
        chat, chat_template=processor._processor.chat_template, tokenize=False, continue_final_message=True)
    assert text_of(processor, reported) == theirs


def test_only_text_can_be_continued(processor, files):
    parts = [{"type": "text", "text": "This: "}, {"type": "image", "image": files["a"]}]
    reported = {"role": "assistant", "content": parts}
    with pytest.raises(RequestError, match="ends with image; only text can be continued"):
        text_of(processor, reported)


def test_a_template_that_leaves_the_last_turn_out(processor, monkeypatch):
    monkeypatch.setattr(type(processor._processor), "apply_chat_template", lambda *_, **__: "nothing of it")
    with pytest.raises(RequestError, match="leaves out the last message"):
        text_of(processor, {"role": "assistant", "content": "It"})


def test_a_continuation_keeps_the_space_between_both(processor):
    chat = [QUESTION, {"role": "assistant", "content": "It is"}]
    assert processor.prepare(parse_request({"id": "r", "messages": chat})).continued and not ask(processor).continued
    ids = processor._processor.tokenizer(" red<|im_end|>")["input_ids"]
    assert processor.decode(ids, continued=True) == " red" and processor.decode(ids) == "red"
