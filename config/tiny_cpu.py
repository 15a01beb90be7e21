# A tiny GPT-2 on a laptop's CPU, to see the whole path work: 0.8M parameters, bytes as tokens.
# Hardware: 2 CPU cores. Tokens: 1,000 steps x 32 sequences x 128 = 4.1M bytes.
# Time: about 2 minutes.
# Data: python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample
model = "tiny"
block_size = 128
dropout = 0.0
data_dir = "data/sample"
learning_rate = 1e-3
max_steps = 1_000
warmup_steps = 50
reweight_warmup_steps = 50
eval_interval = 100
eval_windows = 64
checkpoint_interval = 500
