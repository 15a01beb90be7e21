#!/usr/bin/env bash
# Whether a machine is fit for training: versions, whether the ways to compute a step agree, resuming, memory, network,
# what reweighting costs, and how fast the sizes are. In at most 9 minutes on one GPU, a table to paste.
#   bash scripts/check_node.sh                          # all stages
#   STAGES=step,speed bash scripts/check_node.sh        # some; a name stands for all that begin with it and a "_"
#   CHECK=cpu bash scripts/check_node.sh                # the same code at tiny shapes without a GPU, about a minute
# Settings come from the environment:
#   BUDGET_S=520          seconds for all stages; what does not fit is "not here (time)". 3000 is enough for every size
#   OUT=runs/check_node   results: report.md, report.json, trace.json.gz, and STAGE.json and STAGE.log of each stage
# Where torch is already installed outside of an environment: python scripts/check_node.py does the same with it.
# Every stage is a process of its own: one that fails, hangs or runs out of memory does not stop the others.
# A second start runs the stages without a result; compiled code is kept, so that it needs less time. To repeat a
# stage, delete its STAGE.json.
# Exit code 0 if nothing failed, 1 if something did, 2 for a wrong setting.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt
exec python scripts/check_node.py "$@"
