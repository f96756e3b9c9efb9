#!/usr/bin/env python3
"""Runs llama.cpp's own HTTP server, compiled into the wheel `xllamacpp`, on loopback.

It ends when its standard input does, so that it never outlives the process that started it.
"""

import argparse
import os
import sys

import xllamacpp


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", help="a GGUF file")
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--alias", default="tiny", help="what the model is called")
    arguments.add_argument("--slots", type=int, default=4, help="answers written at once")
    arguments.add_argument("--context", type=int, default=8192, help="tokens per slot")
    arguments.add_argument("--api-key", help="the bearer token to ask for")
    arguments.add_argument("--embeddings", action="store_true", help="serve embeddings alone")
    given = arguments.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = given.port
    params.n_parallel = given.slots
    params.n_ctx = given.context * given.slots
    params.api_keys = [given.api_key] if given.api_key else []
    params.endpoint_slots = True
    params.embedding = given.embeddings
    if given.embeddings:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.verbosity = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # An idle keep-alive connection holds one of these threads for 5 s; the default is a few.
    params.n_threads_http = 32
    params.cache_ram_mib = 16
    params.ui, params.offline, params.fit_params = False, True, False

    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    sys.stdin.buffer.read()
    # Its threads are C++ ones: an orderly exit would wait for idle connections.
    os._exit(0)


if __name__ == "__main__":
    main()
