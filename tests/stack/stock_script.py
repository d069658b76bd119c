"""Answers questions about pictures, the way DeepSpeedExamples' text-generation script completes sentences.

It knows nothing of this project: test_three_lines.py changes three lines of a copy.

    deepspeed --num_accelerators N stock_script.py --name MODEL_DIR --pictures DIR --ds_inference
"""

import os
import time
from argparse import ArgumentParser

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

parser = ArgumentParser()
parser.add_argument("--name", "--model", required=True, help="model directory")
parser.add_argument("--pictures", required=True, help="directory of the pictures")
parser.add_argument("--batch_size", default=4, type=int)
parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
parser.add_argument("--attn", default="sdpa", help="attn_implementation of the model")
parser.add_argument("--max_tokens", default=1024, type=int, help="longest prompt")
parser.add_argument("--max_new_tokens", default=8, type=int)
parser.add_argument("--ds_inference", action="store_true", help="use DeepSpeed's inference engine")
parser.add_argument("--use_kernel", action="store_true", help="use DeepSpeed's kernels")
parser.add_argument("--local_rank", type=int, default=int(os.getenv("LOCAL_RANK", "0")))
parser.add_argument("--world_size", type=int, default=int(os.getenv("WORLD_SIZE", "1")))
args = parser.parse_args()

if args.world_size > 1 and not args.ds_inference:
    raise RuntimeError("without --ds_inference there is one process")

QUESTIONS = [
    ("01-colour.png", "What color is the shape?"),
    ("03-shape.png", "Which shape is in the picture?"),
    ("05-place.png", "Where in the picture is the shape?"),
    ("06-count.png", "How many shapes are in the picture?"),
]


class Pipeline:
    """Pictures and questions in, tokens out."""

    def __init__(self, name: str, dtype: torch.dtype, attn: str, device: int) -> None:
        self.device = torch.device(get_accelerator().device_name(device))
        self.processor = AutoProcessor.from_pretrained(name)
        self.processor.tokenizer.padding_side = "left"
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(name, torch_dtype=dtype, attn_implementation=attn)
        self.model.eval()

    def __call__(self, questions: list[tuple[str, str]], max_new_tokens: int) -> list[list[int]]:
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                 for _, text in questions]
        prompts = [self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                   for chat in chats]
        pictures = [Image.open(os.path.join(args.pictures, picture)) for picture, _ in questions]
        inputs = self.processor(text=prompts, images=pictures, padding=True, return_tensors="pt").to(self.device)
        self.model.to(self.device)
        outputs = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return outputs[:, inputs["input_ids"].shape[1]:].tolist()


data_type = getattr(torch, args.dtype)
pipe = Pipeline(args.name, data_type, args.attn, args.local_rank)

if args.ds_inference:
    pipe.model = deepspeed.init_inference(pipe.model, dtype=data_type, mp_size=args.world_size,
                                          replace_with_kernel_inject=args.use_kernel, max_tokens=args.max_tokens)

questions = QUESTIONS[:args.batch_size]
for _ in range(2):
    start = time.time()
    answers = pipe(questions, args.max_new_tokens)
    seconds = time.time() - start

if args.local_rank == 0:
    print(f"generation time is {seconds} sec")
    for (picture, question), tokens in zip(questions, answers, strict=True):
        text = pipe.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        print(f"\nin={picture}: {question}\nout={text}\ntokens={tokens}\n{'-' * 60}")
