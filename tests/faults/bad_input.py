"""The cases of test_bad_input.py: bad input, and the words of its refusal."""

import csv
import gzip
import io
import json

from tests.faults.changes import config, cut, edit, flags, header, remove, several, write

# Flags behind `--model MODEL --data DATA --seq-len 128 --out OUT`, and the words of the refusal.
FLAGS = {
    "a flag that does not exist": ("--learning-rat 1", "--learning-rat", "no such flag", "--learning-rate"),
    "a value of a switch": ("--resume yes", "yes: neither a flag nor a value of one"),
    "a word for a number": ("--dp x", "--dp: 'x' is not a whole number"),
    "a fraction for a whole number": ("--batch-size 1.5", "--batch-size: '1.5' is not a whole number"),
    "a word for a fraction": ("--learning-rate abc", "--learning-rate: 'abc' is not a number"),
    "a fraction of a token": ("--seq-len 3.3", "--seq-len: length '3.3' is 3.3 tokens"),
    "a length in another unit": ("--seq-len 3kb", "--seq-len: length '3kb': write tokens as 32768, 32k"),
    "a length of 400 digits": ("--seq-len " + "9" * 400, "--seq-len", "below 2^63 tokens"),
    "a length that no rope reaches": ("--seq-len 1000M", "rotary embedding is exact up to"),
    "a bad length among several": ("--lengths 64 zz", "--lengths", "zz"),
    "lengths beside another length": ("--lengths 64 256", "--lengths 64 256", "--seq-len says 128"),
    "a choice that is none": ("--schedule cosin", "invalid choice 'cosin'", "--schedule", "linear"),
    "no value": ("--steps", "--steps", "Missing value"),
    "no steps": ("--steps 0", "--steps 0: must be at least 1"),
    "a negative number": ("--batch-size=-1", "--batch-size -1: must be at least 1"),
    "a batch beyond the data": ("--batch-size 99999999999999999999", "--batch-size", "99999999999999999999"),
    "no number as learning rate": ("--learning-rate nan", "--learning-rate nan: must be a positive number"),
    "an infinite decay": ("--weight-decay inf", "--weight-decay inf: must be a finite number"),
    "a beta of one": ("--beta1 1", "--beta1 1.0: must be at least 0 and below 1"),
    "a large seed": ("--seed 4294967296", "--seed 4294967296: must be below 2^32"),
    "a warm-up beyond the end": ("--steps 3 --warmup-steps 9", "--warmup-steps 9 is more than --steps 3"),
    "a ratio above one": ("--final-learning-rate-ratio 2", "--final-learning-rate-ratio 2.0: must be between 0 and 1"),
    "no regular expression": ("--freeze (", "--freeze '(' is not a regular expression"),
    "a pattern of nothing": ("--freeze nothing_like_it", "--freeze 'nothing_like_it' matches none"),
    "a pattern of everything": ("--freeze .", "matches all", "must leave at least one"),
    "sp and the heads": ("--dp 1 --sp 3", "sp=3 must divide 4 query heads; use 1, 2 or 4 (--sp)"),
    "more devices than there are": ("--dp 4 --sp 4", "dp=4 x sp=4 needs 16 devices and there are 8"),
    "no devices": ("--simulate-devices 0", "--simulate-devices 0: must be at least 1"),
    "packs without packing": ("--pack-attention across", "it needs --pack"),
    "evaluation without data": ("--eval-every 2", "--eval-every needs --eval-data"),
    "a factor of no scaling": ("--rope-factor 2", "--rope-factor 2.0 has no meaning without --rope-scaling"),
    "a scaling by nothing": ("--rope-scaling yarn", "add --rope-factor"),
    "steps backwards": ("--profile-steps 5:3", "--profile-steps 5:3: write the first and the last step"),
    "an unknown machine": (
        "--plan-only --plan-for H1000",
        "--plan-for H1000: no such machine",
        "the closest is H100-80",
    ),
    "a host of nine": ("--plan-only --plan-for 9xH100", "a host has at most 8 devices"),
    "a machine without a plan": ("--plan-for H100", "--plan-for is for --plan-only"),
    "no host memory": ("--host-memory 0", "--host-memory 0.0: must be a positive number of GiB"),
    "samples that do not divide": (
        "--dp 2 --samples-per-step 3",
        "--samples-per-step 3",
        "use 2, 4 or another multiple",
    ),
    "a date in words": ("--template-date tomorrow", "--template-date tomorrow: write a date as 2026-11-27"),
    "no name of a cache": ("--data-cache=", "--data-cache '': name a directory, or `off`"),
    "a split of a file": ("--split train", "--split selects files of a directory", "is no directory"),
    "globs for a file": ("--include *.py", "--include selects files of a directory"),
    "no held-out file": ("--eval-data nowhere.jsonl", "--eval-data nowhere.jsonl: no such file or directory"),
    "a held-out weight": ("--eval-data {data}:0.5", "held-out data have no weights"),
    "a weight of zero": ("--data {data}:0", "the weight '0' is not a positive number"),
    "a source twice": ("--data {data} {data}", "two sources of one name"),
    "data beside no run": ("--add-data {data}", "--add-data adds to the data of a run that is resumed"),
    "no template": ("--chat-template nowhere.jinja", "--chat-template nowhere.jinja: name a file with a chat template"),
    "the update in the backward pass alone": ("--update-in-backward", "--update-in-backward with --clip-norm 1"),
    "offloading without remat": ("--offload-activations --no-remat", "needs --remat, not --no-remat"),
    "a tile of nothing": ("--loss-tile 4 --no-tiled-loss", "--loss-tile has no meaning with --no-tiled-loss"),
    "more layers than there are": ("--debug-attention-layers 9", "the model has 2 layers"),
    "a kernel for GPUs on a CPU": ("--attention flash", "--attention flash needs an NVIDIA GPU", "use --attention xla"),
    "a kernel that is gone": ("--attention tokamax", "invalid choice 'tokamax'", "'flash', 'cudnn', 'xla'"),
    "master weights of float32": ("--dtype float32 --master-weights none", "--master-weights none is for bfloat16"),
    "spikes everywhere": ("--spike-deviations 0", "--spike-deviations 0.0: must be above 0"),
    "back to no checkpoint": ("--on-nonfinite rewind", "--on-nonfinite rewind", "--save-every"),
    "samples of a plan": ("--show-samples 1 --plan-only", "--show-samples 1 reads data"),
    "no model": ("--model=", "--model '': name a Hugging Face directory"),
    "a model that is not there": ("--model ./nowhere", "nowhere: no such directory"),
    "a file as model": ("--model {data}", "{data}: it is a file; --model takes"),
    "a run that is not there": ("--explain-run nowhere", "nowhere: no checkpoint there"),
    "a resume of nothing": ("--resume", "no run to resume there: it has no run.json"),
    "a cache that is a file": ("--data {large} --data-cache {data}", "--data-cache {data}: cannot be read"),
    "a file as --out": ("--out {data}", "--out {data}", "is a file, not a directory"),
    "a directory below a file": ("--out {data}/run", "{data} is a file, not a directory"),
    "a directory in use": ("--out {model}", "--out {model} is not empty; choose another directory"),
}

# A change to a good model directory, and the words of the refusal.
MODELS = {
    "no config.json": (remove("config.json"), "not a Hugging Face model directory: it has no config.json"),
    "a directory config.json": (
        several(remove("config.json"), lambda m: (m / "config.json").mkdir()),
        "no config.json",
    ),
    "no JSON in config.json": (write("config.json", "{"), "config.json is not valid JSON"),
    "bytes in config.json": (write("config.json", b"\xff\xfe"), "config.json is not valid JSON"),
    "a list in config.json": (write("config.json", "[]"), "config.json holds no JSON object"),
    "a text for a size": (config(hidden_size="16"), "hidden_size='16' must be a whole number"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads=0 must be above 0"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000 must be at most"),
    "no vocabulary": (config(vocab_size=...), "lacks vocab_size"),
    "a field nobody knows": (config(magic_attention=3), "not implemented: magic_attention=3"),
    "an unknown rope": (config(rope_parameters={"rope_type": "spiral"}), "RoPE type 'spiral' is not implemented"),
    "a rope that is a text": (config(rope_parameters="yarn"), "rope"),
    "quantised weights": (config(quantization_config={"bits": 4}), "quantization_config is set"),
    "another architecture": (config(model_type="t5", architectures=["T5Model"]), "model_type 't5'", "an encoder"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer (tokenizer.json"),
    "half a tokenizer": (cut("tokenizer.json"), "the tokenizer cannot be read"),
    "a tokenizer that is a list": (write("tokenizer.json", "[]"), "the tokenizer cannot be read"),
    "settings that are no JSON": (write("tokenizer_config.json", "{"), "tokenizer_config.json is not valid JSON"),
    "settings that are a list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json holds no JSON object"),
    "a tokenizer of other code": (
        edit("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "its code comes with the checkpoint (auto_map in tokenizer_config.json), and is never executed",
    ),
    "two bases of rope": (config(rope_theta=5e5), "RoPE settings contradict each other: rope_theta=500000.0"),
    "two ropes": (
        config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "RoPE settings contradict each other: rope_scaling=",
    ),
    "an empty end token": (edit("tokenizer_config.json", eos_token=""), 'eos_token is "", which is no token'),
    "a small vocabulary": (config(vocab_size=100), "outside the model's vocabulary of 100"),
}

# The same for weights, which convert.from_hf reads first.
WEIGHTS = {
    "no weights": (remove("model.safetensors"), "holds no weights"),
    "half the weights": (cut("model.safetensors"), "model.safetensors is corrupt or cut short"),
    "a pointer to weights": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "pickled weights": (several(remove("model.safetensors"), write("pytorch_model.bin", "x")), "pickled files"),
    "weights of an adapter": (write("adapter_config.json", '{"base_model_name_or_path": "b"}'), "an adapter of b"),
    "an index out of the directory": (
        several(remove("model.safetensors"), write("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}')),
        "names files outside of its directory: ../b",
    ),
    "an index of nothing": (
        several(remove("model.safetensors"), write("model.safetensors.index.json", "[]")),
        "not a safetensors index",
    ),
    "a missing shard": (
        several(remove("model.safetensors"), write("model.safetensors.index.json", '{"weight_map": {"a": "b"}}')),
        "names files that are not there: b",
    ),
    "a tensor of another name": (header("model.extra"), "missing", "model.norm.weight", "extra", "model.extra"),
    "integers as weights": (
        header("model.norm.weight", dtype="I16"),
        "model.norm.weight is I16; weights must be one of",
    ),
    "a tensor of another shape": (header("model.norm.weight", shape=[4, 4]), "of another shape", "[4, 4], not [16]"),
    "a tensor beyond the file": (header("model.norm.weight", data_offsets=[0, 2**40]), "is corrupt or cut short"),
}


def row(**fields) -> str:
    return json.dumps(fields) + "\n"


def chat(*messages, **more) -> str:
    return row(messages=list(messages), **more)


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}
GOOD = row(text="long enough " * 20)
TABLE = io.StringIO()
csv.writer(TABLE).writerows([["text", "id"], ["one", "1"], ["two"]])

# A data file, and the words of the refusal. All but the first few would be read to their end otherwise.
DATA = {
    "no such file": ("d.jsonl", None, "--data {file}: no such file or directory"),
    "an empty file": ("d.jsonl", "", "{file}: the file is empty"),
    "blank lines": ("d.jsonl", "\n\n", "--data {file}: no documents found"),
    "empty documents": ("d.jsonl", row(text="") * 2, "records left out: 2 empty"),
    "short documents": ("d.jsonl", row(text="short"), "is too short", "--seq-len"),
    "half a line": ("d.jsonl", GOOD + '{"text": "cut', "{file}:2: not valid JSON"),
    "nested too deep": ("d.jsonl", "[" * 10**5, "{file}:1: not valid JSON"),
    "a list as a record": ("d.jsonl", "[1]\n", "{file}:1: a record is a JSON object", "not list"),
    "records of another key": ("d.jsonl", GOOD + row(body="x"), "{file}:2: neither a 'text' nor a 'messages' field"),
    "two formats at once": ("d.jsonl", row(text="x", messages=[ANSWER]), "both 'text' and 'messages'"),
    "two formats in a file": ("d.jsonl", GOOD + row(prompt="a", completion="b"), "{file}:2", "a file has one format"),
    "a number as text": ("d.jsonl", row(text=5), "'text' holds int, not text (--text-field)"),
    "half a character": ("d.jsonl", '{"text": "\\ud800"}\n', "{file}:1: not Unicode text"),
    "other bytes": ("d.jsonl", b'{"text": "\xff"}\n', "{file}:1: not UTF-8 text"),
    "UTF-16": ("d.jsonl", GOOD.encode("utf-16"), "{file}:1: the text is UTF-16"),
    "a picture": ("d.txt", b"\x89PNG\r\n\x1a\n\xff", "{file}: not UTF-8 text"),
    "half a gzip file": ("d.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "{file}: not a readable .gz file"),
    "no zstd file": ("d.jsonl.zst", GOOD, "{file}: not a readable .zst file"),
    "JSON cut short": ("d.json", '[{"text": "a"}, ', "{file}: not valid JSON"),
    "a row of one field": ("d.csv", TABLE.getvalue(), "{file}:3: 1 fields in a row", "2 columns"),
    "two columns of a name": ("d.csv", "text,text\na,b\n", "{file}:1: the first row names the columns, each once"),
    "an open quote": ("d.csv", 'text\n"a\n', "{file}:2: not valid CSV"),
    "no Parquet": ("d.parquet", GOOD, "{file}: not a readable Parquet file"),
    "no Arrow": ("d.arrow", GOOD, "{file}: not a readable Arrow file"),
    "packed Parquet": ("d.parquet.gz", GOOD, "Parquet and Arrow files are compressed inside"),
    "no list of messages": ("d.jsonl", row(messages="Hi"), "{file}:1: 'messages' is a list of objects"),
    "a message without a role": ("d.jsonl", chat({"content": "x"}), "message 0 lacks 'role' or 'content'"),
    "another name of the assistant": ("d.jsonl", chat(USER, {"role": "model", "content": "x"}), "the role 'model'"),
    "no answer": ("d.jsonl", chat(USER), "no message of the role 'assistant'"),
    "an empty answer": ("d.jsonl", chat(USER, ANSWER | {"content": " "}), "message 1 of the assistant is empty"),
    "a weight of two": ("d.jsonl", chat(USER, ANSWER | {"weight": 2}), "weight 2; a weight is 0"),
    "a weight of a list": ("d.jsonl", chat(USER, ANSWER | {"weight": [1]}), "weight [1]; a weight is 0"),
    "a picture in a chat": (
        "d.jsonl",
        chat({"role": "user", "content": [{"type": "image"}]}),
        "part of the type 'image'",
    ),
    "a key nobody knows": ("d.jsonl", chat(USER, ANSWER | {"mask": 1}), "'mask' is not known", "--ignore-fields mask"),
    "arguments in a list": ("d.jsonl", chat(USER, CALL), "the arguments of f are an object"),
    "tools without a name": ("d.jsonl", chat(USER, ANSWER, tools=[{}]), "each of the 'tools' is a JSON schema"),
    "tools that are not written": ("d.jsonl", chat(USER, ANSWER, tools=[{"name": "f"}]), "does not write the tools"),
    "an unknown speaker": ("d.jsonl", row(conversations=[{"from": "cat", "value": "x"}]), "from 'cat'"),
    "speakers in a list": ("d.jsonl", row(conversations=[{"from": ["human"], "value": "x"}]), "from ['human']"),
    "an empty completion": ("d.jsonl", row(prompt="a", completion=" "), "an empty 'completion'"),
    "a prompt of two kinds": ("d.jsonl", row(prompt="a", completion=[ANSWER]), "two texts or two lists of messages"),
    "an instruction of numbers": ("d.jsonl", row(instruction=1, output="x"), "'instruction' holds int, not text"),
}

# A change to the directory of a run, flags behind `--resume --out RUN --data DATA --steps 3`, and the words.
RUNS = {
    "no run.json": (remove("run.json"), "", "no run to resume there: it has no run.json"),
    "half a run.json": (cut("run.json"), "", "run.json is not valid JSON"),
    "a list in run.json": (write("run.json", "[]"), "", "run.json is not what a run writes"),
    "flags in a list": (edit("run.json", flags=[]), "", "run.json is not what a run writes"),
    "no kind": (edit("run.json", kind=...), "", "run.json is not what a run writes"),
    "a converted model": (edit("run.json", kind="converted"), "", "a converted model, not a run"),
    "additions of numbers": (write("added.json", "[1]"), "", "added.json is not what --add-data writes"),
    "a text as number of steps": (flags(batch_size="3"), "", "run.json", "--batch-size '3'"),
    "a list as length": (flags(seq_len=[1]), "", "run.json", "--seq-len"),
    "a switch as a number": (flags(sp=True), "", "run.json", "--sp True"),
    "a number as data": (flags(include=5), "", "run.json", "--include 5"),
    "an object as a rate": (flags(learning_rate={}), "", "run.json", "--learning-rate {{}}"),
    "a choice that is none": (flags(schedule="cosin"), "", "run.json", "--schedule 'cosin'"),
    "a flag of another version": (flags(warp_drive=3), "", "run.json", "warp_drive", "another version"),
    "a number out of range": (flags(beta1=2), "", "--beta1 2: must be at least 0 and below 1"),
    "no checkpoints": (remove("checkpoints"), "", "the run has saved no checkpoint yet"),
    "no weights": (remove("checkpoints/2/params"), "", "checkpoints/2 cannot be read: params not found"),
    "no optimizer": (remove("checkpoints/2/optimizer"), "", "checkpoints/2 cannot be read: optimizer not found"),
    "no position": (remove("checkpoints/2/loop"), "", "checkpoints/2 cannot be read"),
    "a position that is no JSON": (write("checkpoints/2/loop/metadata", "{"), "", "checkpoints/2 cannot be read"),
    "a position of nothing": (write("checkpoints/2/loop/metadata", "{}"), "", "does not say step, data, geometry"),
    "a position in a list": (write("checkpoints/2/loop/metadata", "[]"), "", "checkpoints/2 cannot be read"),
    "no list of weights": (remove("checkpoints/2/params/_METADATA"), "", "checkpoints/2 cannot be read"),
    "no config.json": (remove("model/config.json"), "", "model is not a Hugging Face model directory"),
    "no tokenizer": (remove("model/tokenizer.json"), "", "model has no tokenizer"),
    "another length": (lambda run: None, "--seq-len 64", "changed since the checkpoint", "--seq-len (128 -> 64)"),
    "another seed": (lambda run: None, "--seed 7", "changed since the checkpoint", "--seed (0 -> 7)"),
    "the same data again": (lambda run: None, "--add-data {data}", "the run has these data since the beginning"),
}

# A command, its arguments, and the words.
CONVERT = {
    "nothing": ("from_hf", "", "required", "--help"),
    "no source": ("from_hf", "nowhere {out}", "nowhere: no such directory"),
    "a target in use": ("from_hf", "{model} {run}", "{run} exists and is not empty"),
    "a file as target": ("from_hf", "{model} {data}", "{data} exists and is not"),
    "a target below a file": ("from_hf", "{model} {data}/x", "{data} is a file, not a directory"),
    "no checkpoint": ("to_hf", "{model} {out}", "{model}: no checkpoint there"),
    "a step that is not there": ("to_hf", "{run}/checkpoints/7 {out}", "no such step; there are 2"),
    "a size in words": ("to_hf", "{run} {out} --shard-size large", "--shard-size large: write a size above zero"),
    "an unknown flag": ("to_hf", "{run} {out} --shards 3", "--shards", "no such flag"),
    "nothing to verify": ("verify", "nowhere", "nowhere: no such directory"),
    "a file to verify": ("verify", "{data}", "{data}: it is a file; name a run"),
}
TABLES = {"train": FLAGS, "model": MODELS, "weights": WEIGHTS, "data": DATA, "resume": RUNS, "convert": CONVERT}
