# Llama 1.4B with LinUpper on FineWeb: the authors' public branch, as far as it is known.
# The paper leaves open: r (the branch has 100, with which no weight exceeds another by more than
# 1 %; here 0.4, the default), the tokenizer, the tokens seen, the evaluation. The 50,000 steps
# are 19 tokens per parameter, our choice. For fewer than 40,000: --warmup_steps STEPS / 20.
# The branch's cosine begins at step 0, ours after the warm-up; it shards within a node (HSDP).
# Hardware: 64 GPUs of 80 GB take a batch at once. Fewer need several micro-steps, and with them a
# first pass for the losses (a third more compute), or --micro_batch_size 0 --recompute full.
# Tokens: 50,000 steps x 128 sequences x 4096 = 26.2 billion.
# Time: 188 H100 hours (estimate of --dry_run: 40 % of the bf16 peak).
# Data: python prepare_slimpajama.py --source files --input fineweb \
#   --schema text=text,constant=fineweb --out data/fineweb
model = "llama_1.4b"
data_dir = "data/fineweb"
mixture = "natural"
block_size = 4096
dropout = 0.0
reweight = "linupper"
reweight_warmup_steps = 2_000
global_batch_size = 128
micro_batch_size = 2
max_steps = 50_000
learning_rate = 3e-4
min_lr = 3e-5
warmup_steps = 2_000
warmup_shape = "quadratic"
weight_decay = 0.1
beta2 = 0.95
parallel = "fsdp"
