# All that the published code sets and a flag here can set; give it after the size:
#   torchrun --nproc_per_node 4 -- train.py config/gpt2_210m.py config/published.py \
#     --reweight linupper
# Every line is written out, also where it is today's default. What is left to differ, line by
# line: docs/reproduction.md. 124M with quadratic was published with --r 1.0.
block_size = 512
dropout = 0.1
data_order = "file"
seed = 42
r = 0.4
r_start = 0.0
delta = 1.0
reweight_norm = "minmax"
reweight_scope = "global"
max_weight = 0.0
reweight_warmup_steps = 1_000
max_steps = 20_000
optimizer = "adamw"
learning_rate = 5e-4
min_lr = 1e-4
warmup_steps = 500
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0
skip_grad_norm = 0.0
dtype = "float32"
