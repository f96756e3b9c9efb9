//! The names of parameters: which are known, and which are dangerous.

use crate::openai::Endpoint;

/// Parameters of servers that reach deeper than a caller should: into the
/// template of the prompt, the files and addresses that the server reads, its
/// grammar compiler, its scheduler, its adapters; and bounds on the answer under
/// names that are not OpenAI's. Each is one of vLLM, SGLang, llama.cpp, TGI or
/// Ollama. Sorted.
const EXTRAS: [&str; 71] = [
    "adapter_id",
    "allowed_local_media_path",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "cache_prompt",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "custom_logit_processor",
    "custom_params",
    "data_parallel_rank",
    "documents",
    "ebnf",
    "ec_transfer_params",
    "extra_args",
    "extra_body",
    "extra_headers",
    "extra_query",
    "grammar",
    "guided_backend",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "id_slot",
    "image_data",
    "input_embeds",
    "json_schema",
    "keep_alive",
    "kv_transfer_params",
    "logits_processors",
    "lora",
    "lora_adapter",
    "lora_name",
    "lora_path",
    "lora_request",
    "max_length",
    "max_new_tokens",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "modalities_data",
    "multi_modal_data",
    "multi_modal_uuids",
    "n_cache_reuse",
    "n_cmpl",
    "n_predict",
    "n_probs",
    "num_predict",
    "options",
    "parse_special",
    "priority",
    "prompt_embeds",
    "prompt_logprobs",
    "raw",
    "regex",
    "request_id",
    "return_hidden_states",
    "return_routed_experts",
    "rid",
    "samplers",
    "session_params",
    "slot_id",
    "structural_tag",
    "structured_outputs",
    "template",
    "tokenizer_kwargs",
    "video_data",
    "vllm_xargs",
];

/// Of every call that generates text, beside its own: vLLM's and others'
/// harmless ones.
const SAMPLING: [&str; 34] = [
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "continue_final_message",
    "detokenize",
    "dry_allowed_length",
    "dry_base",
    "dry_multiplier",
    "enable_thinking",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "length_penalty",
    "min_p",
    "min_tokens",
    "mirostat",
    "reasoning",
    "repeat_penalty",
    "repetition_penalty",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "thinking",
    "thinking_token_budget",
    "tfs_z",
    "top_a",
    "top_k",
    "truncate_prompt_tokens",
    "typical_p",
    "use_beam_search",
    "echo",
];

const CHAT: [&str; 36] = [
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "modalities",
    "model",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
    "research_mode",
];

const COMPLETIONS: [&str; 19] = [
    "best_of",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "model",
    "n",
    "presence_penalty",
    "prompt",
    "response_format",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
    "store",
];

const RESPONSES: [&str; 31] = [
    "background",
    "conversation",
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "model",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "safety_identifier",
    "seed",
    "service_tier",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
    "stop",
    "research_mode",
];

const EMBEDDINGS: [&str; 9] = [
    "add_special_tokens",
    "dimensions",
    "encoding_format",
    "input",
    "input_type",
    "messages",
    "model",
    "truncate_prompt_tokens",
    "user",
];

const RERANK: [&str; 8] = [
    "documents",
    "max_tokens_per_doc",
    "model",
    "query",
    "return_documents",
    "top_k",
    "top_n",
    "truncate_prompt_tokens",
];

const MODERATIONS: [&str; 3] = ["input", "model", "user"];

/// Says whether a call has a parameter of this name.
pub(super) fn is_known(endpoint: Endpoint, name: &str) -> bool {
    own(endpoint).contains(&name) || endpoint.streams() && SAMPLING.contains(&name)
}

/// Says whether any call has it.
pub(super) fn is_known_anywhere(name: &str) -> bool {
    Endpoint::ALL
        .into_iter()
        .any(|endpoint| own(endpoint).contains(&name))
}

/// Says whether a parameter, in lower case, is a dangerous one.
pub(super) fn extra(name: &str) -> bool {
    EXTRAS.binary_search(&name).is_ok()
}

const fn own(endpoint: Endpoint) -> &'static [&'static str] {
    match endpoint {
        Endpoint::ChatCompletions => &CHAT,
        Endpoint::Completions => &COMPLETIONS,
        Endpoint::Responses => &RESPONSES,
        Endpoint::Embeddings => &EMBEDDINGS,
        Endpoint::Rerank => &RERANK,
        Endpoint::Moderations => &MODERATIONS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dangerous_ones_can_be_looked_up() {
        assert!(EXTRAS.is_sorted());
        for name in EXTRAS {
            assert!(extra(name), "{name}");
            assert!(!SAMPLING.contains(&name) && !CHAT.contains(&name), "{name}");
        }
    }
}
