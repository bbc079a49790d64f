//! Format `folder`: one directory per class of image files, as torchvision's `ImageFolder`.
//!
//! Classes are the given `classes` in their order, or else the sorted directory names. Images come class by
//! class, within a class by directory and file name (bytes, so the order does not depend on the file system
//! or locale). Subdirectories of a class belong to it; symbolic links are followed, each real directory
//! once per class, so loops end. Names that start with a dot are ignored, as are files that are no images;
//! image formats that cannot be read here are an error rather than silently fewer images.
//!
//! A `split` is a folder inside `path`. With a `limit` images are taken from the classes in turn (the first ones of a class-by-class order would
//! all show one class); their order stays class by class.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::decode::{Decoding, READABLE};
use super::error::DatasetError;
use super::image_type::Image;
use super::registry::{Dataset, DatasetSpec, Format, PathParameter, SourceFile};
use super::subset::even_counts;

/// The `folder` format.
pub struct Folder;

const PATHS: &[PathParameter] = &[PathParameter {
    name: "path",
    doc: "directory with one directory of image files per class",
    required: true,
}];

/// What torchvision or people would also count as images.
const OTHER_IMAGES: &[&str] = &["tif", "tiff", "gif", "avif", "heic", "jp2", "jxl"];

impl Format for Folder {
    fn id(&self) -> &'static str {
        "folder"
    }

    fn summary(&self) -> &'static str {
        "image folder: one directory of image files per class (torchvision's ImageFolder)"
    }

    fn paths(&self) -> &'static [PathParameter] {
        PATHS
    }

    fn files(&self, spec: &DatasetSpec) -> Result<Vec<SourceFile>, DatasetError> {
        let listing = list(&root(spec, self)?, spec)?;
        Ok(listing
            .files
            .into_iter()
            .map(|(path, label)| SourceFile { path, role: "image", label: Some(label) })
            .collect())
    }

    fn open(&self, spec: &DatasetSpec) -> Result<Box<dyn Dataset>, DatasetError> {
        let listing = list(&root(spec, self)?, spec)?;
        let (paths, labels) = listing.files.into_iter().unzip();
        Ok(Box::new(FolderDataset { classes: listing.classes, paths, labels, decoding: spec.decoding }))
    }
}

/// The folder of the split.
fn root(spec: &DatasetSpec, format: &Folder) -> Result<PathBuf, DatasetError> {
    let path = spec.path(format, "path")?;
    Ok(spec.split.as_ref().map_or_else(|| path.to_owned(), |split| path.join(split)))
}

struct FolderDataset {
    classes: Vec<String>,
    paths: Vec<PathBuf>,
    labels: Vec<u32>,
    decoding: Decoding,
}

impl Dataset for FolderDataset {
    fn labels(&self) -> &[u32] {
        &self.labels
    }

    fn image(&self, index: usize) -> Result<Image, DatasetError> {
        let path =
            self.paths.get(index).ok_or(DatasetError::IndexOutOfRange { index, len: self.paths.len() })?;
        self.decoding.file(path)
    }

    fn classes(&self) -> Option<&[String]> {
        Some(&self.classes)
    }

    fn describe(&self, index: usize) -> String {
        match self.paths.get(index) {
            Some(path) => format!("`{}`", path.display()),
            None => format!("image {index}"),
        }
    }
}

struct Listing {
    classes: Vec<String>,
    files: Vec<(PathBuf, u32)>,
}

fn list(root: &Path, spec: &DatasetSpec) -> Result<Listing, DatasetError> {
    let found = class_directories(root)?;
    let classes = match &spec.classes {
        Some(classes) => {
            let missing: Vec<String> =
                classes.iter().filter(|&class| !found.contains(class)).cloned().collect();
            if !missing.is_empty() {
                let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
                return Err(DatasetError::MissingClasses { root: root.to_owned(), missing, found });
            }
            let unknown: Vec<String> = found.into_iter().filter(|name| !classes.contains(name)).collect();
            if !unknown.is_empty() {
                return Err(DatasetError::UnknownClasses { root: root.to_owned(), unknown });
            }
            classes.clone()
        }
        None => found,
    };
    if classes.is_empty() {
        return Err(DatasetError::NoClasses { root: root.to_owned() });
    }
    let mut per_class = Vec::with_capacity(classes.len());
    for class in &classes {
        per_class.push(class_files(&root.join(class))?);
    }
    let counts = even_counts(&per_class.iter().map(Vec::len).collect::<Vec<_>>(), spec.limit);
    let files = (0_u32..)
        .zip(per_class.into_iter().zip(counts))
        .flat_map(|(label, (files, count))| files.into_iter().take(count).map(move |path| (path, label)))
        .collect();
    Ok(Listing { classes, files })
}

/// Returns the sorted names of the directories in `root`.
fn class_directories(root: &Path) -> Result<Vec<String>, DatasetError> {
    let mut names = Vec::new();
    for entry in fs_err::read_dir(root)? {
        let entry = entry?;
        if is_hidden(&entry.file_name()) || !file_type(&entry)?.is_dir() {
            continue;
        }
        let name = entry.file_name().into_string();
        names.push(name.map_err(|_| DatasetError::NotUnicode { path: entry.path() })?);
    }
    names.sort_unstable();
    Ok(names)
}

/// What an entry is, or what it links to. Only links cost a look at the file: a listing of thousands of images is part of every plan.
fn file_type(entry: &fs_err::DirEntry) -> std::io::Result<std::fs::FileType> {
    let listed = entry.file_type()?;
    if listed.is_symlink() { Ok(fs_err::metadata(entry.path())?.file_type()) } else { Ok(listed) }
}

/// Lists the images below `class_directory`: directories in the order of their paths, files by name.
fn class_files(class_directory: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let mut visited = HashSet::new();
    let mut pending = vec![class_directory.to_owned()];
    let mut found: Vec<(OsString, OsString)> = Vec::new();
    while let Some(directory) = pending.pop() {
        if !visited.insert(fs_err::canonicalize(&directory)?) {
            continue;
        }
        let mut subdirectories = Vec::new();
        for entry in fs_err::read_dir(&directory)? {
            let entry = entry?;
            let (name, path) = (entry.file_name(), entry.path());
            if is_hidden(&name) {
                continue;
            }
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
            // A dangling link is an error only where an image or a directory was meant.
            let file_type = match file_type(&entry) {
                Err(_) if !READABLE.contains(&extension.as_str()) && entry.file_type()?.is_symlink() => {
                    continue;
                }
                file_type => file_type?,
            };
            if file_type.is_dir() {
                subdirectories.push(path);
            } else if READABLE.contains(&extension.as_str()) {
                found.push((directory.clone().into_os_string(), name));
            } else if OTHER_IMAGES.contains(&extension.as_str()) {
                return Err(DatasetError::UnsupportedImage { path, extension });
            }
        }
        // Which path a directory with several links is listed under must not depend on the file system.
        subdirectories.sort_unstable_by(|a, b| b.cmp(a));
        pending.extend(subdirectories);
    }
    if found.is_empty() {
        return Err(DatasetError::EmptyClass { path: class_directory.to_owned() });
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(directory, name)| Path::new(&directory).join(name)).collect())
}

fn is_hidden(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

#[cfg(test)]
mod tests {
    use super::super::registry::{files, open};
    use super::*;

    fn write_png(path: &Path, value: u8) {
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        image::GrayImage::from_pixel(2, 3, image::Luma([value]))
            .save_with_format(path, image::ImageFormat::Png)
            .unwrap();
    }

    fn spec(root: &Path) -> DatasetSpec {
        DatasetSpec {
            name: "shapes".into(),
            format: "folder".into(),
            paths: [("path".to_owned(), root.to_owned())].into(),
            ..DatasetSpec::default()
        }
    }

    fn names(spec: &DatasetSpec) -> Vec<(String, u32)> {
        let root = &spec.paths["path"];
        files(spec)
            .unwrap()
            .into_iter()
            .map(|file| (file.path.strip_prefix(root).unwrap().display().to_string(), file.label.unwrap()))
            .collect()
    }

    fn error(spec: &DatasetSpec) -> String {
        let prefix = format!("{}", spec.paths["path"].display());
        files(spec).unwrap_err().to_string().replace(&prefix, "ROOT")
    }

    #[test]
    fn classes_are_the_sorted_directories_and_files_are_sorted_within() {
        let root = tempfile::tempdir().unwrap();
        for name in
            ["b/10.png", "b/9.PNG", "a/x.png", "C/z.png", "a/sub/y.png", "a/.hidden.png", ".git/q.png"]
        {
            write_png(&root.path().join(name), 7);
        }
        fs_err::write(root.path().join("README"), "x").unwrap();
        fs_err::write(root.path().join("a/notes.txt"), "x").unwrap();
        let spec = spec(root.path());
        let expected = [("C/z.png", 0), ("a/x.png", 1), ("a/sub/y.png", 1), ("b/10.png", 2), ("b/9.PNG", 2)];
        assert_eq!(names(&spec), expected.map(|(name, label)| (name.to_owned(), label)));
        let dataset = open(&spec).unwrap();
        assert_eq!(dataset.classes().unwrap(), ["C", "a", "b"]);
        assert_eq!(dataset.labels(), [0, 1, 1, 2, 2]);
        let image = dataset.image(4).unwrap();
        assert_eq!((image.height(), image.width(), image.channels()), (3, 2, 1));
        assert_eq!(image.pixels(), [7; 6]);
        assert!(dataset.describe(4).ends_with("b/9.PNG`"));
        assert!(dataset.image(5).is_err());
    }

    #[test]
    fn given_classes_decide_the_labels() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cat/1.png", "ant/1.png", "bee/1.png"] {
            write_png(&root.path().join(name), 0);
        }
        let mut spec = spec(root.path());
        spec.classes = Some(["cat", "bee", "ant"].map(str::to_owned).to_vec());
        let expected = [("cat/1.png", 0), ("bee/1.png", 1), ("ant/1.png", 2)];
        assert_eq!(names(&spec), expected.map(|(name, label)| (name.to_owned(), label)));

        spec.classes = Some(["cat", "bee", "dog", "../ant"].map(str::to_owned).to_vec());
        assert_eq!(error(&spec), "`ROOT` has no directory for class `dog`, `../ant`; found ant, bee, cat");
        spec.classes = Some(["cat"].map(str::to_owned).to_vec());
        assert_eq!(error(&spec), "`ROOT` has directories that are not in `classes`: `ant`, `bee`");
    }

    #[test]
    fn refuses_empty_roots_empty_classes_and_formats_it_cannot_read() {
        let root = tempfile::tempdir().unwrap();
        let spec = spec(root.path());
        assert_eq!(error(&spec), "`ROOT` has no class directories");
        fs_err::create_dir(root.path().join("a")).unwrap();
        assert_eq!(error(&spec), "class directory `ROOT/a` holds no images");
        fs_err::write(root.path().join("a/x.tiff"), "x").unwrap();
        assert_eq!(
            error(&spec),
            "cannot read `ROOT/a/x.tiff`: images with the extension `tiff` are not supported"
        );
    }

    #[test]
    fn a_limit_deals_images_to_the_classes_in_turn() {
        let root = tempfile::tempdir().unwrap();
        for name in ["a/1.png", "a/2.png", "a/3.png", "b/1.png"] {
            write_png(&root.path().join(name), 0);
        }
        let limited = DatasetSpec { limit: Some(3), ..spec(root.path()) };
        let expected = [("a/1.png", 0), ("a/2.png", 0), ("b/1.png", 1)];
        assert_eq!(names(&limited), expected.map(|(name, label)| (name.to_owned(), label)));
    }

    #[cfg(unix)]
    #[test]
    fn symbolic_links_are_followed_and_loops_end() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        write_png(&root.path().join("a/1.png"), 0);
        symlink(root.path().join("a"), root.path().join("a/loop")).unwrap();
        symlink(root.path(), root.path().join("a/up")).unwrap();
        symlink(root.path().join("nowhere"), root.path().join("a/dangling")).unwrap();
        symlink(root.path().join("a"), root.path().join("b")).unwrap();
        let spec = spec(root.path());
        let listed = names(&spec);
        assert!(listed.contains(&("a/1.png".to_owned(), 0)) && listed.contains(&("b/1.png".to_owned(), 1)));
        assert_eq!(listed, names(&spec), "the order is stable");
        symlink(root.path().join("nowhere"), root.path().join("a/2.png")).unwrap();
        assert!(error(&spec).contains("a/2.png"));
    }
}
