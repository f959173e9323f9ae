#!/usr/bin/env bash
# What curl alone can do with a weight server: name the commit, list files, read a range, download and continue.
#
#   export HF_ENDPOINT=http://minilm-weights:8080     # or what `modelcache up` printed
#   examples/hub/curl.sh sentence-transformers/all-MiniLM-L6-v2 model.safetensors     # FILE as in a URL
set -euo pipefail
: "${HF_ENDPOINT:?set it to the address of a weight server}"
repo=${1:?which repo} file=${2:?which file}
curl=(curl --fail --silent --show-error)

# The commit that main stands for now. What is asked for by its commit never changes.
commit=$("${curl[@]}" --head "$HF_ENDPOINT/$repo/resolve/main/$file" | tr -d '\r' | sed -n 's/^X-Repo-Commit: //p')
echo "$repo is at $commit"
"${curl[@]}" "$HF_ENDPOINT/api/models/$repo/tree/$commit?recursive=true"
echo

# A safetensors file begins with the length of its header, eight bytes.
"${curl[@]}" --range 0-7 "$HF_ENDPOINT/$repo/resolve/$commit/$file" | od -A n -t u8

# --continue-at - goes on where an earlier download ended: of this commit's file, since the part's name has the commit.
name=$(basename "$file") part=$(basename "$file").$commit.part
"${curl[@]}" --continue-at - --output "$part" "$HF_ENDPOINT/$repo/resolve/$commit/$file"
mv "$part" "$name"
sha256sum "$name"
