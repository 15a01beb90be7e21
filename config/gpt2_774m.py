# GPT-2 774M: the recipe of the other sizes; the paper did not train this one.
# Strategy: --reweight.
# Hardware: 4 GPUs of 40 GB or more. Tokens: 20,000 steps x 48 sequences x 512 = 492M.
# Time: 6.8 A100 hours (estimate: 6 FLOP per parameter and token, 30 % of the bf16 peak).
model = "774m"
global_batch_size = 48
