"""Answer questions with a Hugging Face MoE checkpoint on FP4 experts.

    python examples/generate.py Qwen3-30B-A3B-NVFP4 "Why is the sky blue?" "What is JAX?"

The folder holds config.json, safetensors files and tokenizer.json. `--format nvfp4` rounds experts
that are not FP4 yet while they are read. `jaxmoe generate FOLDER` does the same with more to say.
"""

import argparse
import time

from jaxmoe import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--format", default=None, help="nvfp4 or mxfp4: round the experts")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    text = models.Tokenizer(args.folder)
    model = models.load_pretrained(args.folder, weight_format=args.format)
    chats = [[{"role": "user", "content": question}] for question in args.questions]
    prompts = [text.encode_chat(chat) for chat in chats]
    streams = [models.TextStream(text) for _ in prompts]
    answers = [""] * len(prompts)
    start, count = time.perf_counter(), 0
    parts = models.generate_tokens(
        model,
        prompts,  # of any lengths
        max_new_tokens=args.max_new_tokens,
        sampling=models.Sampling(temperature=0.7, top_p=0.95),
        stop=text.stop,
    )
    for part in parts:
        count += sum(map(len, part))
        for row, tokens in enumerate(part):
            answers[row] += streams[row].push(tokens)
    for question, answer, stream in zip(args.questions, answers, streams, strict=True):
        print(f"> {question}\n{answer}{stream.end()}\n")
    print(f"{count} tokens, {count / (time.perf_counter() - start):.0f} a second with compilation")


if __name__ == "__main__":
    main()
