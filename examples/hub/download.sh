#!/usr/bin/env bash
# A model's files into a folder with Hugging Face's own command, checked against what the server says:
#
#   export HF_ENDPOINT=http://minilm-weights:8080     # or what `modelcache up` printed
#   examples/hub/download.sh sentence-transformers/all-MiniLM-L6-v2 ./model
set -euo pipefail
: "${HF_ENDPOINT:?set it to the address of a weight server}"
repo=${1:?which repo} folder=${2:?into which folder}

hf download "$repo" --local-dir "$folder"
hf cache verify "$repo" --local-dir "$folder" # sha256 of each file; needs huggingface_hub 1.1 or later
