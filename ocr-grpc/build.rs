//! Generates the messages, clients and servers of both generations of the contract from `proto/ocr.proto`, and of our
//! own services from `proto/ocr_v1.proto`, without protoc. Also writes both generations' descriptors, for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;
use prost_types::FileDescriptorSet;

/// Messages whose text may hold secrets; `src/proto.rs` writes their `Debug` by hand.
const SECRET: [&str; 5] = ["Account", "Condition", "ExecutorResponse", "Feature", "Inject"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=proto");

    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let newer = protox::compile(["ocr.proto"], ["proto"])?;
    configure().skip_debug(SECRET).out_dir(&out).compile_fds(newer.clone())?;

    let ours = protox::compile(["ocr_v1.proto"], ["proto"])?;
    configure().out_dir(&out).compile_fds(ours.clone())?;
    let ours = without_comments(ours);

    // Comments are found by position; they are dropped because services are, here and at run time.
    let newer = without_comments(newer);
    let older = older_generation(newer.clone())?;
    fs::write(out.join("ocr.bin"), with(&newer, &ours).encode_to_vec())?;
    fs::write(out.join("ocr_older.bin"), with(&older, &ours).encode_to_vec())?;

    // Only the one service differs; the messages are those of the newer generation.
    let out = out.join("older");
    fs::create_dir_all(&out)?;
    let mut config = configure().out_dir(&out);
    for file in &older.file {
        if file.package.is_none() {
            let messages = file.message_type.iter().map(|message| message.name());
            let enums = file.enum_type.iter().map(|message| message.name());
            for name in messages.chain(enums) {
                config = config.extern_path(format!(".{name}"), format!("crate::proto::{name}"));
            }
        }
    }
    let mut condition = older;
    for file in &mut condition.file {
        file.service.retain(|service| service.name() == "ConditionService");
    }
    config.compile_fds(condition)?;
    Ok(())
}

fn configure() -> tonic_prost_build::Builder {
    tonic_prost_build::configure().codec_path("crate::codec::SmallCodec")
}

/// A generation of the contract together with what is ours.
fn with(contract: &FileDescriptorSet, ours: &FileDescriptorSet) -> FileDescriptorSet {
    FileDescriptorSet { file: [contract.file.as_slice(), ours.file.as_slice()].concat() }
}

fn without_comments(mut set: FileDescriptorSet) -> FileDescriptorSet {
    for file in &mut set.file {
        file.source_code_info = None;
    }
    set
}

/// The older generation differs in one word: `ConditionService.create` returns an `Identifier`.
fn older_generation(mut set: FileDescriptorSet) -> Result<FileDescriptorSet, Box<dyn Error>> {
    let create = set
        .file
        .iter_mut()
        .flat_map(|file| &mut file.service)
        .filter(|service| service.name() == "ConditionService")
        .flat_map(|service| &mut service.method)
        .find(|method| method.name() == "create")
        .ok_or("the schema has no ConditionService.create")?;
    create.output_type = Some(".Identifier".to_owned());
    Ok(set)
}
