//! An alert on its way to people: a webhook, or a command. What does not arrive
//! is tried again by the [`board`](super::board).

use std::{
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use serde_json::json;
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use super::board::Alert;
use crate::{
    logging::Seldom,
    outbound::{Endpoint, Outbound, Outgoing},
};

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
pub(super) enum To {
    /// A URL that gets each alert as a POST.
    Webhook { endpoint: Endpoint, format: Format },
    /// A program and its arguments.
    Command(Vec<String>),
}

/// Somebody who is told.
pub(super) struct Receiver {
    /// What this gateway is called.
    pub(super) source: String,
    pub(super) to: To,
    pub(super) timeout: Duration,
    pub(super) failures: Seldom,
}

impl Receiver {
    /// Tells him, once; returns whether he was reached.
    pub(super) async fn tell(&self, outbound: &Outbound, alert: &Alert, at: SystemTime) -> bool {
        let (name, told) = match &self.to {
            To::Webhook { endpoint, format } => {
                let text = match format {
                    Format::Json => self.body(alert, at),
                    Format::Slack => self.slack(alert),
                };
                // The endpoint shows its origin only: the path of a webhook is
                // its secret.
                let told = self.post(outbound, endpoint, text).await;
                (format!("{endpoint:?}"), told)
            }
            To::Command(command) => {
                let program = command.first().map_or("", String::as_str);
                let told = self.run(command, &self.body(alert, at), alert).await;
                (format!("{program:?}"), told)
            }
        };
        let Err(why) = told else {
            return true;
        };
        if let Some(others) = self.failures.due(Instant::now()) {
            let kind = alert.kind.as_str();
            log::warn!("alert not delivered: to={name} kind={kind} others={others} {why}");
        }
        false
    }

    async fn post(&self, outbound: &Outbound, to: &Endpoint, body: String) -> Result<(), String> {
        let call = Outgoing::post(to.url().clone(), "application/json", body);
        let until = Instant::now() + self.timeout;
        match outbound.send(to, call, ANSWER_MAX, until).await {
            Ok(answer) if answer.status.is_success() => Ok(()),
            Ok(answer) => Err(format!("status {}", answer.status.as_u16())),
            Err(why) => Err(why.to_string()),
        }
    }

    /// Runs the command with the alert as JSON on its standard input.
    async fn run(&self, command: &[String], body: &str, alert: &Alert) -> Result<(), String> {
        let Some((program, arguments)) = command.split_first() else {
            return Ok(());
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
        let mut child = spawned.map_err(|why| why.to_string())?;
        let ran = async {
            if let Some(mut stdin) = child.stdin.take() {
                // A program that does not read it has what it needs.
                stdin.write_all(body.as_bytes()).await.ok();
            }
            child.wait().await
        };
        match timeout(self.timeout, ran).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(status.to_string()),
            Ok(Err(why)) => Err(why.to_string()),
            Err(_elapsed) => Err("not done in time".to_owned()),
        }
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

    fn receiver(command: &[&str]) -> Receiver {
        Receiver {
            source: "gate".to_owned(),
            to: To::Command(command.iter().map(|word| (*word).to_owned()).collect()),
            timeout: Duration::from_secs(20),
            failures: Seldom::default(),
        }
    }

    fn alert(subject: &str) -> Alert {
        Alert {
            ticket: 1,
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
        let slack = receiver(&[]).slack(&alert);
        assert!(slack.contains("&lt;!channel&gt;x"), "{slack}");
        assert!(slack.len() < 400, "{slack}");
        let body = receiver(&[]).body(&alert, SystemTime::UNIX_EPOCH);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["at"], "1970-01-01T00:00:00Z");
        assert_eq!(body["suppressed"], 2);
    }

    #[tokio::test]
    async fn a_command_that_fails_or_is_not_there_has_not_told_anybody() {
        let now = SystemTime::now();
        let outbound = Outbound::new();
        for (command, reached) in [
            (vec!["true"], true),
            (vec!["false"], false),
            (vec!["/there/is/no/such/program"], false),
            (vec![], true),
        ] {
            let told = receiver(&command).tell(&outbound, &alert("a"), now).await;
            assert_eq!(told, reached, "{command:?}");
        }
    }

    #[tokio::test]
    async fn a_command_gets_the_alert_and_nothing_of_our_environment() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("told");
        let script = format!("cat > {0}; env >> {0}", file.display());
        let receiver = receiver(&["sh", "-c", &script]);
        let (outbound, alert) = (Outbound::new(), alert("gpu-1"));
        assert!(receiver.tell(&outbound, &alert, SystemTime::now()).await);
        let told = std::fs::read_to_string(file).unwrap();
        assert!(told.contains(r#""subject":"gpu-1""#), "{told}");
        assert!(told.contains("FOREBAY_ALERT_KIND=breaker"), "{told}");
        assert!(!told.contains("CARGO"), "{told}");
    }
}
