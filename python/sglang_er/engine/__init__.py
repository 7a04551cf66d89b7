"""The only room that imports `sglang.srt` (private API): CPU platform, speculative worker, weight sync, admin."""
