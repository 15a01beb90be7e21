# GPT-2 684M: the published recipe, but for what docs/reproduction.md lists.
# Strategy: --reweight.
# Hardware: 4 GPUs of 40 GB or more. Tokens: 20,000 steps x 48 sequences x 512 = 492M.
# Time: 6.0 A100 hours (estimate: 6 FLOP per parameter and token, 30 % of the bf16 peak).
model = "684m"
global_batch_size = 48
