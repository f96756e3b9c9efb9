//! An alert on its way to people: webhooks and a command.

use std::{
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use serde_json::json;
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use super::board::Alert;
use crate::outbound::{Endpoint, Outbound, Outgoing};

/// How often one webhook is tried.
const TRIES: u32 = 3;
/// How long it is waited before the second try; twice that before the third.
const PAUSE: Duration = Duration::from_secs(1);
/// The most of a webhook's answer that is read: nobody looks at it.
const ANSWER_MAX: usize = 64 * 1024;
/// The most of a subject that is told: the name of a model is a client's word.
const SUBJECT_MAX: usize = 200;

/// What a webhook reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Format {
    /// One object: `source`, `kind`, `state`, `subject`, `message`, `at`,
    /// `suppressed`.
    #[default]
    Json,
    /// What Slack's incoming webhooks read, and those of Mattermost, Discord
    /// (`/slack`) and others: `text`.
    Slack,
}

/// Where alerts go.
pub(super) struct Webhook {
    pub(super) endpoint: Endpoint,
    pub(super) format: Format,
}

/// Everybody who is told.
pub(super) struct Receivers {
    /// What this gateway is called.
    pub(super) source: String,
    pub(super) webhooks: Vec<Webhook>,
    /// A program and its arguments.
    pub(super) command: Vec<String>,
    pub(super) timeout: Duration,
    pub(super) outbound: Outbound,
}

impl Receivers {
    /// Tells everybody; returns how many were not reached.
    pub(super) async fn tell(&self, alert: &Alert, at: SystemTime) -> usize {
        let body = self.body(alert, at);
        let webhooks = self.webhooks.iter().map(|webhook| async {
            let text = match webhook.format {
                Format::Json => body.clone(),
                Format::Slack => self.slack(alert),
            };
            self.post(webhook, text).await
        });
        let posted = futures_util::future::join_all(webhooks);
        let (posted, ran) = tokio::join!(posted, self.run(&body, alert));
        posted.iter().filter(|told| !**told).count() + usize::from(!ran)
    }

    async fn post(&self, webhook: &Webhook, body: String) -> bool {
        for number in 0..TRIES {
            if number > 0 {
                tokio::time::sleep(PAUSE * 2_u32.pow(number - 1)).await;
            }
            let url = webhook.endpoint.url().clone();
            let call = Outgoing::post(url, "application/json", body.clone());
            let until = Instant::now() + self.timeout;
            let sent = self
                .outbound
                .send(&webhook.endpoint, call, ANSWER_MAX, until);
            // The endpoint shows its origin only: the path of a webhook is its
            // secret.
            let why = match sent.await {
                Ok(answer) if answer.status.is_success() => return true,
                Ok(answer) => format!("status {}", answer.status.as_u16()),
                Err(why) => why.to_string(),
            };
            log::warn!(
                "alert not delivered: to={:?} try={number} {why}",
                webhook.endpoint
            );
        }
        false
    }

    /// Runs the command with the alert as JSON on its standard input.
    async fn run(&self, body: &str, alert: &Alert) -> bool {
        let Some((program, arguments)) = self.command.split_first() else {
            return true;
        };
        let state = state_of(alert);
        let spawned = Command::new(program)
            .args(arguments)
            // Our own environment may hold the keys of upstreams.
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("FOREBAY_ALERT_KIND", alert.kind.as_str())
            .env("FOREBAY_ALERT_STATE", state)
            .env("FOREBAY_ALERT_SUBJECT", cut(&alert.subject))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(why) => {
                log::warn!("alert not delivered: command={program:?} {why}");
                return false;
            }
        };
        let ran = async {
            if let Some(mut stdin) = child.stdin.take() {
                // A program that does not read it has what it needs.
                stdin.write_all(body.as_bytes()).await.ok();
            }
            child.wait().await
        };
        let why = match timeout(self.timeout, ran).await {
            Ok(Ok(status)) if status.success() => return true,
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(why)) => why.to_string(),
            Err(_elapsed) => "not done in time".to_owned(),
        };
        log::warn!("alert not delivered: command={program:?} {why}");
        false
    }

    fn body(&self, alert: &Alert, at: SystemTime) -> String {
        json!({
            "source": self.source,
            "kind": alert.kind.as_str(),
            "state": state_of(alert),
            "subject": cut(&alert.subject),
            "message": sentence(alert),
            "at": humantime::format_rfc3339_seconds(at).to_string(),
            "suppressed": alert.suppressed,
        })
        .to_string()
    }

    fn slack(&self, alert: &Alert) -> String {
        let sign = if alert.wrong {
            ":red_circle:"
        } else {
            ":white_check_mark:"
        };
        let mut text = format!("{}: {}", self.source, sentence(alert));
        if alert.suppressed > 0 {
            text.push_str(&format!(" (again {} times since)", alert.suppressed));
        }
        // Slack reads these three as mark-up.
        let text = text
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;");
        json!({ "text": format!("{sign} {text}") }).to_string()
    }
}

fn state_of(alert: &Alert) -> &'static str {
    if alert.wrong { "firing" } else { "recovered" }
}

fn sentence(alert: &Alert) -> String {
    let subject = cut(&alert.subject);
    format!("{} {subject}: {}", alert.kind.as_str(), alert.detail)
}

fn cut(text: &str) -> String {
    let visible = text.chars().filter(|letter| !letter.is_control());
    visible.take(SUBJECT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::board::Kind, *};

    fn receivers(command: &[&str]) -> Receivers {
        Receivers {
            source: "gate".to_owned(),
            webhooks: Vec::new(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: Duration::from_secs(20),
            outbound: Outbound::new(),
        }
    }

    fn alert(subject: &str) -> Alert {
        Alert {
            kind: Kind::Breaker,
            subject: subject.into(),
            wrong: true,
            detail: "open".to_owned(),
            suppressed: 2,
        }
    }

    #[test]
    fn a_clients_words_are_neither_markup_nor_endless() {
        let alert = alert(&format!("<!channel>\u{7}{}", "x".repeat(1000)));
        let slack = receivers(&[]).slack(&alert);
        assert!(slack.contains("&lt;!channel&gt;x"), "{slack}");
        assert!(slack.len() < 400, "{slack}");
        let body = receivers(&[]).body(&alert, SystemTime::UNIX_EPOCH);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["at"], "1970-01-01T00:00:00Z");
        assert_eq!(body["suppressed"], 2);
    }

    #[tokio::test]
    async fn a_command_that_fails_or_is_not_there_is_counted() {
        let now = SystemTime::now();
        for (command, failed) in [
            (vec!["true"], 0),
            (vec!["false"], 1),
            (vec!["/there/is/no/such/program"], 1),
            (vec![], 0),
        ] {
            let receivers = receivers(&command);
            assert_eq!(
                receivers.tell(&alert("a"), now).await,
                failed,
                "{command:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_command_gets_the_alert_and_nothing_of_our_environment() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("told");
        let script = format!("cat > {0}; env >> {0}", file.display());
        let receivers = receivers(&["sh", "-c", &script]);
        assert_eq!(receivers.tell(&alert("gpu-1"), SystemTime::now()).await, 0);
        let told = std::fs::read_to_string(file).unwrap();
        assert!(told.contains(r#""subject":"gpu-1""#), "{told}");
        assert!(told.contains("FOREBAY_ALERT_KIND=breaker"), "{told}");
        assert!(!told.contains("CARGO"), "{told}");
    }
}
