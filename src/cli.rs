//! The command line: arguments in, one of the jobs out.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};

use crate::{
    config::{self, Catalog, Loaded},
    ctl, demo, export,
    gateway::{Gateway, catalog},
    logging,
    metrics::Metrics,
    plugins::{hash_token, new_token},
    resources::Resources,
    server::{self, Predecessor},
    sim::{Sim, SimOptions},
};

/// Where the configuration is looked for when none is named.
const DEFAULT_FILE: &str = "conf/forebay.yaml";

/// A self-hosted AI inference gateway: one binary, one YAML, in front of every
/// model server you have.
#[derive(Debug, Parser)]
#[command(name = "forebay", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the gateway.
    Run(ConfigFile),
    /// Checks a configuration: prints every problem, exits with 1 if there is any.
    Check {
        #[command(flatten)]
        file: ConfigFile,
        /// Prints the effective configuration, with every default, secrets masked.
        #[arg(long)]
        print: bool,
    },
    /// Prints the JSON Schema of the configuration, for editors.
    Schema,
    /// Makes client keys for the auth plugin's keys file.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Shows, resets, drains the upstreams of a running gateway; shows what keys have used.
    Ctl {
        #[command(subcommand)]
        command: ctl::CtlCommand,
        #[command(flatten)]
        target: ctl::Target,
        /// The configuration that the gateway runs with.
        #[arg(short, long = "config", value_name = "FILE", global = true)]
        config: Option<PathBuf>,
    },
    /// Has a running gateway replaced by the program that is on the disk now, with
    /// the configuration as it is now: nobody who is being served notices. If that
    /// cannot serve, says why, and the running one goes on.
    Upgrade {
        #[command(flatten)]
        target: ctl::Target,
        /// The configuration that the gateway runs with.
        #[arg(short, long = "config", value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Turns captured files into training data in other formats.
    Export(export::ExportOptions),
    /// Runs the gateway in front of three simulated model servers.
    Demo(demo::DemoOptions),
    /// Runs a simulated model server, for tests and load tests.
    Sim(SimOptions),
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// The configuration file. Without it, conf/forebay.yaml if there is one,
    /// else a built-in default: every model to Ollama on 127.0.0.1:11434.
    #[arg(short, long = "config", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Makes a new key: prints the token, which is shown only now, on standard
    /// output, and its entry for the keys file on standard error.
    New {
        /// What the key is called in logs and metrics.
        #[arg(default_value = "new-key")]
        name: String,
    },
    /// Prints the SHA-256 of a token, read from standard input, for the keys file.
    Hash,
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        // Who read the output has seen enough.
        Err(why) if is_broken_pipe(&why) => ExitCode::SUCCESS,
        Err(why) => {
            say_err(&format!("forebay: {why:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(file) => serve(&file),
        Command::Check { file, print } => check(&file, print),
        Command::Schema => {
            let schema = config::schema(&catalog());
            say(&serde_json::to_string_pretty(&schema)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Key(KeyCommand::New { name }) => new_key(&name),
        Command::Key(KeyCommand::Hash) => hash_key(),
        Command::Ctl {
            command,
            target,
            config,
        } => {
            let file = find(&ConfigFile { config });
            say(&ctl::run(&command, &target, file.as_deref())?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Upgrade { target, config } => {
            let file = find(&ConfigFile { config });
            say(&ctl::upgrade(&target, file.as_deref())?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Export(options) => {
            // The output may be standard output.
            say_err(&export::run(&options)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo(options) => demo::run(&options),
        Command::Sim(options) => simulate(options),
    }
}

/// Returns the file to read, or `None` for the built-in default.
fn find(file: &ConfigFile) -> Option<PathBuf> {
    match &file.config {
        Some(named) => Some(named.clone()),
        None => Some(PathBuf::from(DEFAULT_FILE)).filter(|file| file.exists()),
    }
}

fn load(path: Option<&Path>, catalog: &Catalog) -> Result<Loaded, config::Problems> {
    match path {
        Some(path) => config::load(path, catalog),
        None => config::built_in(catalog),
    }
}

fn serve(file: &ConfigFile) -> anyhow::Result<ExitCode> {
    server::survive_hangups();
    let predecessor = Predecessor::find().context("the process before this one is lost")?;
    let path = find(file);
    let loaded = match load(path.as_deref(), &catalog()) {
        Ok(loaded) => loaded,
        Err(problems) => {
            if let Some(predecessor) = predecessor {
                predecessor.failed(&problems.to_string());
            }
            return Ok(refuse(&problems));
        }
    };
    let built_in = path.is_none();
    start(loaded, path, predecessor, |_| {
        if built_in {
            log::warn!(
                "no configuration: {DEFAULT_FILE} does not exist and no -c was given; \
                 every model goes to Ollama on 127.0.0.1:11434"
            );
        }
    })
}

/// Starts logging, builds the gateway and serves until a signal says stop. A
/// predecessor is told why, if that is not possible.
pub(crate) fn start(
    loaded: Loaded,
    file: Option<PathBuf>,
    predecessor: Option<Predecessor>,
    ready: impl FnOnce(&Gateway),
) -> anyhow::Result<ExitCode> {
    let tell = predecessor.clone();
    let tell = |why: &str| {
        if let Some(predecessor) = &tell {
            predecessor.failed(why);
        }
    };
    let metrics = Arc::new(Metrics::new());
    let dropped = metrics.log_dropped.clone();
    let log = logging::init(&loaded.config.log, &loaded.base, dropped)
        .inspect_err(|why| tell(&format!("the log cannot be opened: {why}")))
        .context("the log cannot be opened")?;
    let log = Arc::new(log);
    let gateway = match Gateway::new(loaded, file, Arc::new(Resources::new(metrics))) {
        Ok(gateway) => Arc::new(gateway),
        Err(problems) => {
            tell(&problems.to_string());
            return Ok(refuse(&problems));
        }
    };
    for warning in &gateway.snapshot().loaded.warnings {
        log::warn!("{warning}");
    }
    ready(&gateway);
    let served = server::run(gateway, Arc::clone(&log), predecessor);
    log.flush();
    if let Err(why) = served {
        let why = anyhow::Error::from(why);
        tell(&format!("{why:#}"));
        return Err(why);
    }
    Ok(ExitCode::SUCCESS)
}

fn refuse(problems: &config::Problems) -> ExitCode {
    say_err(&problems.to_string());
    let count = problems.iter().count();
    let noun = if count == 1 { "problem" } else { "problems" };
    say_err(&format!("forebay: {count} {noun} in the configuration"));
    ExitCode::FAILURE
}

fn check(file: &ConfigFile, print: bool) -> anyhow::Result<ExitCode> {
    let path = find(file);
    // Whoever checks is not the service, nor is what systemd starts to reload it.
    let catalog = Catalog {
        credentials_elsewhere: true,
        ..catalog()
    };
    let loaded = match load(path.as_deref(), &catalog) {
        Ok(loaded) => loaded,
        Err(problems) => return Ok(refuse(&problems)),
    };
    let text = config::effective(&loaded);
    let name = loaded.file.display().to_string();
    // What only shows when it is built: keys files, authorities, routes.
    let gateway = match Gateway::new(loaded, path, Arc::new(Resources::default())) {
        Ok(gateway) => gateway,
        Err(problems) => return Ok(refuse(&problems)),
    };
    for warning in &gateway.snapshot().loaded.warnings {
        say_err(&format!("warning: {warning}"));
    }
    if print {
        say(text.trim_end())?;
    } else {
        say(&format!("{name}: ok"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn is_broken_pipe(why: &anyhow::Error) -> bool {
    why.downcast_ref::<io::Error>()
        .is_some_and(|why| why.kind() == io::ErrorKind::BrokenPipe)
}

fn new_key(name: &str) -> anyhow::Result<ExitCode> {
    if name.trim().is_empty() || name.len() > 64 || name.contains(char::is_control) {
        bail!("expected a name of 1 to 64 printable characters");
    }
    let token = new_token();
    say_err("The token, shown only now; the gateway keeps its hash:");
    say(token.expose())?;
    say_err(&format!(
        "\nFor the keys file:\n  - {{ name: {}, sha256: {} }}",
        serde_json::to_string(name)?,
        hash_token(token.expose())
    ));
    Ok(ExitCode::SUCCESS)
}

fn hash_key() -> anyhow::Result<ExitCode> {
    let mut token = String::new();
    io::stdin()
        .take(4096)
        .read_to_string(&mut token)
        .context("the token cannot be read from standard input")?;
    let token = token.trim();
    if token.is_empty() {
        bail!("expected a token on standard input");
    }
    // 128 bits in base64 are 22 characters; less can be guessed.
    if token.len() < 22 {
        say_err("warning: a token this short can be guessed; `forebay key new` makes better ones");
    }
    say(&hash_token(token))?;
    Ok(ExitCode::SUCCESS)
}

fn simulate(options: SimOptions) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let sim = Sim::start(options).await.context("cannot listen")?;
        say(&format!(
            "simulated model server `{}`\n  base URL  {}\n  control   http://{}/",
            sim.name(),
            sim.url(),
            sim.control_addr()
        ))?;
        tokio::signal::ctrl_c().await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Prints a line that the user asked for.
pub(crate) fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Prints a line that explains. Nobody listening is no error.
fn say_err(line: &str) {
    writeln!(io::stderr().lock(), "{line}").ok();
}
