//! `forebay export`: captured files → training data in other formats.
//!
//! Nothing is there half: an output is written beside its place and renamed.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, IsTerminal as _, Read, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::sharegpt::{
    export::{Format, Unfit, dataset_info},
    read::Captured,
};

/// The longest line that is read, in bytes: a request, an answer, and what
/// escapes add.
const LINE_MAX: u64 = 2 << 30;
/// What the data set is called in `dataset_info.json`.
const DATASET: &str = "forebay";

/// What to export, and how.
#[derive(Debug, Args)]
pub(crate) struct ExportOptions {
    /// What it is for: vLLM's benchmark takes sharegpt-json (one array), Unsloth
    /// sharegpt-plain (lines of words, no tools), TRL, Axolotl and OpenAI
    /// openai-jsonl (messages), LLaMA-Factory a folder.
    #[arg(long, value_name = "FORMAT")]
    to: To,
    /// The file to write, for llamafactory the folder; without it, standard output.
    #[arg(short, long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Leaves out what says the same as something before it.
    #[arg(long)]
    dedup: bool,
    /// Also takes answers that are not whole.
    #[arg(long)]
    partial: bool,
    /// What becomes of the model's thoughts; templates other than those with
    /// `<think>` want them stripped.
    #[arg(long, default_value = "keep")]
    thoughts: Thoughts,
    /// Captured files, .jsonl or .jsonl.zst, or folders of them.
    #[arg(required = true, value_name = "FILES")]
    files: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum To {
    SharegptJson,
    SharegptPlain,
    OpenaiJsonl,
    Llamafactory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Thoughts {
    Keep,
    Strip,
}

impl From<To> for Format {
    fn from(to: To) -> Self {
        match to {
            To::SharegptJson => Self::SharegptJson,
            To::SharegptPlain => Self::SharegptPlain,
            To::OpenaiJsonl => Self::OpenaiJsonl,
            To::Llamafactory => Self::Llamafactory,
        }
    }
}

/// What became of the lines.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    written: u64,
    bad: u64,
    partial: u64,
    twice: u64,
    empty: u64,
    tools: u64,
    images: u64,
    /// Files that end before their end.
    cut: u64,
}

/// Exports, and returns a line that says what became of the lines.
pub(crate) fn run(options: &ExportOptions) -> anyhow::Result<String> {
    let files = find(&options.files)?;
    if let Some(out) = &options.out {
        apart(options, &files, out)?;
    }
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    let progress = progress(total);
    let mut export = Export {
        options,
        counts: Counts::default(),
        seen: HashSet::new(),
        images: HashSet::new(),
    };
    match (&options.out, options.to) {
        (Some(out), To::Llamafactory) => export.folder(&files, out, &progress)?,
        (None, To::Llamafactory) => bail!("llamafactory is a folder: name it with --out"),
        (Some(out), _) => {
            let mut part = Part::of(out)?;
            export.all(&files, &mut Output::of(&mut part.file), &progress)?;
            export.any()?;
            part.finish()?;
        }
        (None, _) => {
            let mut out = BufWriter::new(io::stdout().lock());
            export.all(&files, &mut Output::of(&mut out), &progress)?;
            out.flush()?;
            export.any()?;
        }
    }
    progress.finish_and_clear();
    Ok(export.counts.to_string())
}

/// Returns the files to read, with their sizes: those of a folder in the order
/// of their names.
fn find(named: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for path in named {
        let found = fs::metadata(path).with_context(|| path.display().to_string())?;
        if !found.is_dir() {
            files.push((path.clone(), found.len()));
            continue;
        }
        let mut inside = Vec::new();
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let is_data = name.ends_with(".jsonl") || name.ends_with(".jsonl.zst");
            if is_data && !name.starts_with('.') && entry.file_type()?.is_file() {
                inside.push((entry.path(), entry.metadata()?.len()));
            }
        }
        if inside.is_empty() {
            bail!(
                "{}: no .jsonl and no .jsonl.zst in this folder",
                path.display()
            );
        }
        inside.sort();
        files.append(&mut inside);
    }
    Ok(files)
}

/// Sees to it that nothing is written where it is read from: captured files
/// would be gone, or the next export would read this one.
///
/// # Errors
/// The output is one of the files, or lies in a folder that is read.
fn apart(options: &ExportOptions, files: &[(PathBuf, u64)], out: &Path) -> anyhow::Result<()> {
    let real = |path: &Path| path.canonicalize().ok();
    let refused = |read: &Path| {
        let (out, read) = (out.display(), read.display());
        bail!("{out}: {read} is read, and would be written to: choose another --out")
    };
    // What is not there yet is no file of ours, and no folder of captures.
    let place = real(out);
    if let Some((file, _)) = files
        .iter()
        .find(|(file, _)| place.is_some() && real(file) == place)
    {
        return refused(file);
    }
    let folder = match (options.to, out.parent()) {
        (To::Llamafactory, _) => place,
        (_, Some(parent)) if !parent.as_os_str().is_empty() => real(parent),
        _ => real(Path::new(".")),
    };
    let named = options.files.iter().map(|named| (named, real(named)));
    let parents = files
        .iter()
        .filter(|_| options.to == To::Llamafactory)
        .map(|(file, _)| {
            (
                file,
                real(file).and_then(|file| Some(file.parent()?.to_owned())),
            )
        });
    match named
        .chain(parents)
        .find(|(_, read)| folder.is_some() && *read == folder)
    {
        Some((read, _)) => refused(read),
        None => Ok(()),
    }
}

/// A bar on a terminal, and nothing anywhere else.
fn progress(total: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{wide_bar} {bytes}/{total_bytes} {eta}";
    let style =
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style)
}

/// Where lines are written.
struct Output<'a> {
    out: &'a mut dyn Write,
    /// Where those without images are written, if apart.
    wordy: Option<&'a mut dyn Write>,
}

impl<'a> Output<'a> {
    fn of(out: &'a mut dyn Write) -> Self {
        Self { out, wordy: None }
    }

    fn for_line(&mut self, has_images: bool) -> &mut dyn Write {
        match &mut self.wordy {
            Some(wordy) if !has_images => &mut **wordy,
            _ => &mut *self.out,
        }
    }
}

struct Export<'a> {
    options: &'a ExportOptions,
    counts: Counts,
    seen: HashSet<[u8; 16]>,
    /// Where the images of exported lines are, by their names.
    images: HashSet<(PathBuf, String)>,
}

impl Export<'_> {
    /// Writes all lines of all files.
    fn all(
        &mut self,
        files: &[(PathBuf, u64)],
        output: &mut Output<'_>,
        progress: &ProgressBar,
    ) -> anyhow::Result<()> {
        let is_array = self.options.to == To::SharegptJson;
        if is_array {
            output.out.write_all(b"[")?;
        }
        for (path, _) in files {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            let counted = progress.wrap_read(file);
            let plain: Box<dyn Read> = if path.extension().is_some_and(|end| end == "zst") {
                let decoder = zstd::stream::read::Decoder::new(counted);
                Box::new(decoder.with_context(|| path.display().to_string())?)
            } else {
                Box::new(counted)
            };
            self.lines(path, BufReader::with_capacity(1 << 20, plain), output)?;
        }
        if is_array {
            output.out.write_all(b"\n]\n")?;
        }
        Ok(())
    }

    /// Sees whether anything was exported of files that are damaged.
    ///
    /// # Errors
    /// Nothing was: no script should take that for a data set.
    fn any(&self) -> anyhow::Result<()> {
        if self.counts.written == 0 && self.counts.bad + self.counts.cut > 0 {
            bail!("{}", self.counts);
        }
        Ok(())
    }

    fn lines(
        &mut self,
        path: &Path,
        mut file: impl BufRead,
        output: &mut Output<'_>,
    ) -> anyhow::Result<()> {
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            match file.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
                Ok(0) => break,
                Ok(_) => {}
                Err(why) => {
                    // What came before it is good.
                    progress_note(&format!("{}:{number}: {why}", path.display()));
                    self.counts.cut += 1;
                    break;
                }
            }
            let text = line.trim_ascii();
            if text.is_empty() {
                continue;
            }
            match Captured::read(text) {
                Some(captured) => {
                    let has_images = !captured.images.is_empty();
                    if let Some(rendered) = self.render(path, captured) {
                        let out = output.for_line(has_images);
                        let before: &[u8] = match (self.options.to, self.counts.written) {
                            (To::SharegptJson, 0) => b"\n",
                            (To::SharegptJson, _) => b",\n",
                            _ => b"",
                        };
                        out.write_all(before)?;
                        out.write_all(&rendered)?;
                        if self.options.to != To::SharegptJson {
                            out.write_all(b"\n")?;
                        }
                        self.counts.written += 1;
                    }
                }
                None => {
                    if self.counts.bad < 10 {
                        let path = path.display();
                        progress_note(&format!("{path}:{number}: no captured line, left out"));
                    }
                    self.counts.bad += 1;
                }
            }
        }
        Ok(())
    }

    /// Returns a line in the format that is asked for, if it belongs there.
    fn render(&mut self, path: &Path, mut line: Captured) -> Option<Vec<u8>> {
        if line.meta.partial && !self.options.partial {
            self.counts.partial += 1;
            return None;
        }
        if line.says_nothing() {
            self.counts.empty += 1;
            return None;
        }
        if self.options.thoughts == Thoughts::Strip {
            line.strip_thoughts();
        }
        // Only what is exported can be there twice.
        let rendered = match Format::from(self.options.to).render(&line) {
            Ok(rendered) => rendered,
            Err(Unfit::Tools) => {
                self.counts.tools += 1;
                return None;
            }
            Err(Unfit::Images) => {
                self.counts.images += 1;
                return None;
            }
        };
        if self.options.dedup && !self.seen.insert(line.fingerprint()) {
            self.counts.twice += 1;
            return None;
        }
        if self.options.to == To::Llamafactory {
            let folder = path.parent().unwrap_or(Path::new("")).to_owned();
            let named = line.images.into_iter().map(|name| (folder.clone(), name));
            self.images.extend(named);
        }
        Some(rendered)
    }

    /// Writes a folder for LLaMA-Factory: the lines, their images, and the file
    /// that names the columns. What else is in the folder stays.
    fn folder(
        &mut self,
        files: &[(PathBuf, u64)],
        out: &Path,
        progress: &ProgressBar,
    ) -> anyhow::Result<()> {
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        let data = format!("{DATASET}.jsonl");
        let mut part = Part::of(&out.join(&data))?;
        // Loaders guess the types of columns from the first lines: those with
        // images come first, or their list would be one of nothing.
        let mut wordy = Part::of(&out.join(format!("{DATASET}-wordy.jsonl")))?;
        let mut output = Output {
            out: &mut part.file,
            wordy: Some(&mut wordy.file),
        };
        self.all(files, &mut output, progress)?;
        self.any()?;
        wordy.file.flush()?;
        io::copy(&mut File::open(&wordy.beside)?, &mut part.file)?;
        drop(wordy);
        for (folder, name) in &self.images {
            copy_image(&folder.join(name), &out.join(name))?;
        }
        part.finish()?;
        let info = out.join("dataset_info.json");
        let mut sets: Map<String, Value> = match fs::read(&info) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{}: expected a JSON object", info.display()))?,
            Err(why) if why.kind() == io::ErrorKind::NotFound => Map::new(),
            Err(why) => return Err(why).with_context(|| info.display().to_string()),
        };
        sets.insert(DATASET.to_owned(), dataset_info(&data));
        let mut part = Part::of(&info)?;
        serde_json::to_writer_pretty(&mut part.file, &sets)?;
        part.file.write_all(b"\n")?;
        part.finish()
    }
}

fn copy_image(from: &Path, to: &Path) -> anyhow::Result<()> {
    if to.exists() {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut image = File::open(from).with_context(|| from.display().to_string())?;
    let mut part = Part::of(to)?;
    io::copy(&mut image, &mut part.file)?;
    part.finish()
}

/// A file that is not in its place yet; removed unless it is finished.
struct Part {
    file: BufWriter<File>,
    beside: PathBuf,
    place: PathBuf,
    finished: bool,
}

impl Part {
    fn of(place: &Path) -> anyhow::Result<Self> {
        let mut name = std::ffi::OsString::from(".");
        name.push(place.file_name().context("--out names no file")?);
        name.push(format!(".{}.part", std::process::id()));
        let beside = place.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)
            .with_context(|| place.display().to_string())?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            beside,
            place: place.to_owned(),
            finished: false,
        })
    }

    fn finish(mut self) -> anyhow::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        fs::rename(&self.beside, &self.place).with_context(|| self.place.display().to_string())?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.finished {
            // It may be gone with its folder.
            fs::remove_file(&self.beside).ok();
        }
    }
}

/// Says something beside the output. Nobody listening is no error.
fn progress_note(line: &str) {
    writeln!(io::stderr().lock(), "{line}").ok();
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exported {}", lines(self.written))?;
        for (count, why) in [
            (self.bad, "damaged"),
            (self.partial, "not whole (--partial takes them)"),
            (self.twice, "there already"),
            (self.empty, "with an answer of no words"),
            (self.tools, "with tools, which the format has no place for"),
            (
                self.images,
                "with images, which the format has no place for",
            ),
        ] {
            if count > 0 {
                write!(f, "\n  left out {} {why}", lines(count))?;
            }
        }
        if self.cut > 0 {
            write!(
                f,
                "\n  {} of the files could not be read to the end",
                self.cut
            )?;
        }
        Ok(())
    }
}

fn lines(count: u64) -> String {
    let noun = if count == 1 { "line" } else { "lines" };
    format!("{count} {noun}")
}
