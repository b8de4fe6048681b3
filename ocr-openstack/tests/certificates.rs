//! Which certificates of a cloud are believed.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail it")]

use std::{io::Write, sync::Arc};

use ocr_core::{ErrorKind, Result, Retry};
use ocr_openstack::{Config, Identity};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer},
    },
};

/// Asks a cloud of this certificate, which refuses with 401: whoever gets that far has believed the certificate.
async fn ask(chain: Vec<CertificateDer<'static>>, key: &rcgen::KeyPair, settings: &[(&str, &str)]) -> ErrorKind {
    let error = session(chain, key, settings).await.unwrap_err();
    if error.kind() == ErrorKind::Unavailable {
        assert_eq!(error.retry(), Retry::Never, "{error}");
        assert!(error.message().contains("certificate") && error.message().contains("OCR_CA_FILE"), "{error}");
    }
    error.kind()
}

async fn session(chain: Vec<CertificateDer<'static>>, key: &rcgen::KeyPair, settings: &[(&str, &str)]) -> Result<()> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let auth_url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let mut server = JoinSet::new();
    server.spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            // A client that does not like the certificate ends the handshake.
            let Ok(mut connection) = acceptor.accept(connection).await else { continue };
            let _ = connection.read(&mut [0; 4096]).await;
            let _ = connection.write_all(b"HTTP/1.1 401 -\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    let common = [
        ("AUTH_URL", auth_url.as_str()),
        ("CREDENTIAL_ID", "ca20d06770314c518f00b33f2d003834"),
        ("CREDENTIAL_SECRET", "secret"),
        ("REGION", "RegionOne"),
        ("GATEWAY_NETWORK", "public"),
    ];
    let lookup = |name: &str| {
        settings.iter().chain(&common).find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
    };
    Identity::new(&Config::from_lookup(lookup).unwrap())?.session().await.map(|_| ())
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_refused_unless_told_otherwise() {
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let chain = vec![own.cert.der().clone()];
    assert_eq!(ask(chain.clone(), &own.signing_key, &[]).await, ErrorKind::Unavailable);
    assert_eq!(ask(chain, &own.signing_key, &[("GLOBAL_INSECURE", "True")]).await, ErrorKind::Denied);
}

#[tokio::test]
async fn a_named_authority_vouches_for_its_certificates_and_for_no_others() {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new([]).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = parameters.self_signed(&authority_key).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(authority.pem().as_bytes()).unwrap();
    let settings = [("OCR_CA_FILE", file.path().to_str().unwrap())];

    let key = rcgen::KeyPair::generate().unwrap();
    for (name, wanted) in [("localhost", ErrorKind::Denied), ("elsewhere.example", ErrorKind::Unavailable)] {
        let issuer = rcgen::Issuer::from_params(&parameters, &authority_key);
        let issued = rcgen::CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        assert_eq!(ask(vec![issued.der().clone()], &key, &settings).await, wanted, "{name}");
    }
    let stranger = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    assert_eq!(ask(vec![stranger.cert.der().clone()], &stranger.signing_key, &settings).await, ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_file_that_holds_no_certificate_is_named() {
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let empty = tempfile::NamedTempFile::new().unwrap();
    for file in [empty.path().to_str().unwrap(), "/nowhere/ca.pem"] {
        let settings = [("OCR_CA_FILE", file)];
        let error = session(vec![own.cert.der().clone()], &own.signing_key, &settings).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().starts_with("OCR_CA_FILE: ") && error.message().contains(file), "{error}");
    }
}
