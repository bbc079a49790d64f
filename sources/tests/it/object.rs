//! `s3://`, `gs://`, `az://`, against a server that knows paths and ranges. Signatures are not checked, but they must be there.

use crate::lab::Lab;
use crate::server::{Answer, Server, bytes, content};
use merganser_sources::Error;

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn s3_lab(server: &Server) -> Lab {
    let variables = variables(&[
        ("AWS_ENDPOINT_URL", &server.url("")),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "eu-central-1"),
        ("AWS_PAGER", "less"),
    ]);
    Lab { variables, ..Lab::new() }
}

#[test]
fn an_object_is_downloaded_signed_and_once() {
    let body = bytes(700_000, 1);
    let whole = body.clone();
    let server = Server::start(move |request| match request.path.as_str() {
        "/bucket/models/model.safetensors" => content(request, &whole, "\"one\""),
        _ => Answer::status(404),
    });
    let mut lab = s3_lab(&server);
    server.cut_next(300_000);
    let located = lab.get("s3://bucket/models/model.safetensors").unwrap();
    assert_eq!(fs_err::read(&located.path).unwrap(), body);
    let asked = server.asked();
    assert_eq!(asked.len(), 2, "{asked:#?}");
    for request in &asked {
        let authorization = request.header("authorization").unwrap();
        assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential=key/"), "{authorization}");
    }
    assert_eq!(
        (asked[1].header("range"), asked[1].header("if-match")),
        (Some("bytes=300000-"), Some("\"one\""))
    );

    server.forget();
    assert_eq!(lab.read("s3://bucket/models/model.safetensors"), body);
    assert_eq!((server.count("GET"), server.count("HEAD")), (0, 1));
    lab.pin(&located);
    server.forget();
    assert_eq!(lab.read("s3://bucket/models/model.safetensors"), body);
    assert_eq!(server.asked().len(), 0);
    assert_eq!(lab.get("s3://bucket/models/").unwrap().path, located.path);
}

#[test]
fn a_busy_store_is_asked_again_and_refusals_are_told() {
    let server = Server::start(|request| match request.path.as_str() {
        "/bucket/x" => content(request, b"content", "\"one\""),
        "/bucket/secret" => Answer::status(403),
        _ => Answer::status(404),
    });
    let lab = s3_lab(&server);
    server.next(Answer::status(503).with("Retry-After", 3));
    assert_eq!(lab.read("s3://bucket/x"), b"content");
    assert_eq!(lab.waits.lock().unwrap()[0].as_secs(), 3);
    let error = lab.fails("s3://bucket/secret");
    assert!(matches!(error, Error::Refused { status: 403, .. }), "{error}");
    let error = lab.fails("s3://bucket/missing");
    assert!(error.to_string().contains("there is no such file: `missing`"), "{error}");
}

#[test]
fn unencrypted_endpoints_elsewhere_need_to_be_allowed() {
    let variables = variables(&[
        ("AWS_ENDPOINT_URL", "http://store.invalid"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ]);
    let error = Lab { variables, ..Lab::new() }.fails("s3://bucket/x").to_string();
    assert!(error.contains("AWS_ALLOW_HTTP") || error.contains("not encrypted"), "{error}");
}

#[test]
fn google_and_azure_are_read_the_same_way() {
    let server = Server::start(|request| {
        content(request, request.path.split('?').next().unwrap().as_bytes(), "\"one\"")
    });
    let lab = Lab {
        variables: variables(&[
            ("GOOGLE_BASE_URL", &server.url("")),
            ("GOOGLE_SKIP_SIGNATURE", "true"),
            ("AZURE_STORAGE_ENDPOINT", &server.url("")),
            ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
            ("AZURE_SKIP_SIGNATURE", "true"),
            ("AZURE_ALLOW_HTTP", "true"),
        ]),
        ..Lab::new()
    };
    assert_eq!(lab.read("gs://bucket/a/b.bin"), b"/bucket/a%2Fb%2Ebin");
    assert_eq!(lab.read("az://container/a/b.bin"), b"/container/a/b.bin");
}
