//! The shortest way through: one question, one answer.

use crate::support::{Gateway, chat, http::post_chat, one_group, sim};

#[tokio::test]
async fn a_question_is_answered_by_an_upstream() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.upstream(), "gpu-1");
    assert!(answer.content().starts_with("gpu-1 answers:"));
}
